"""One file per rule that rates weights; the file name is the name used in recipes."""
