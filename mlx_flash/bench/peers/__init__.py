"""Other programs on the same weights and the same memory, each in its own process."""
