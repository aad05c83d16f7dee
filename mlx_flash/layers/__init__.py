"""What multiplies: FFN modules whose weights are on flash."""
