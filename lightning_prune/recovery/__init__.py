"""After pruning: low-rank updates that keep zeros, partial retraining, distillation, reconstruction."""
