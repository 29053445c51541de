"""The `lightning-prune` command."""
