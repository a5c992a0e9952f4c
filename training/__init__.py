"""Training: synthetic view-consistent heads and the paper's two adaptations."""
