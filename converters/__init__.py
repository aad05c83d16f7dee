"""From checkpoints to flash folders: one file a unit kind."""
