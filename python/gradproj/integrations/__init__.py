"""One small file for each framework that owns the training loop."""
