"""Training: Minari data in, checkpoint out; text in, checkpoint out."""
