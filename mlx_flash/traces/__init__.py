"""What runs asked for, recorded and replayed."""
