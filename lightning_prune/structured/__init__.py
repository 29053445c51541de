"""Physical shrinking: which dimensions belong together, which units to keep, and the smaller model."""
