"""Sizes that the readers, the planner and the file format share, in bytes."""

PAGE_BYTES = 4096  # what direct I/O wants aligned: offset, length and address
