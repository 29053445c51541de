"""One file per way to let a model decide, input by input, which of its parts compute."""
