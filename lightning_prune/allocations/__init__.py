"""One file per rule that splits a sparsity over the targets; the file name is the name used in recipes."""
