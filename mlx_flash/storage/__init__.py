"""Where bytes lie, and how they are read."""
