"""Which parameters are pruned: told from what a layer is and where it lies."""
