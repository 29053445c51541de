"""One file per on-disk form of a pruned model; every form is a folder that is written whole or not at all."""
