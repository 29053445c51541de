"""Find what can be cut from a model, and prove it."""
