"""Training: one readable file per method."""
