"""One file per rule that also repairs the weights that stay."""
