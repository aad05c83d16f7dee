"""Sizes in bytes that the readers, the slots, the file format and the plan share."""

import sys

PAGE_BYTES = 4096  # what direct I/O wants aligned: offset, length and address
LARGE_PAGE_BYTES = 16384  # a page of Apple silicon; slots and files begin on one
# What a direct read into several buffers wants each of them aligned to. At any other
# buffer XNU ends a device read (cluster_read_direct): one long read becomes several.
SCATTER_BYTES = LARGE_PAGE_BYTES if sys.platform == "darwin" else PAGE_BYTES
MERGE_BYTES = 1 << 18  # the longest read that merging neighbours makes
CHUNK_BYTES = 1 << 20  # the readers split longer parts, so that threads share them
