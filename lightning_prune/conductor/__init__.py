"""The conductor and its parts: how decisions become masks that are held in a training."""
