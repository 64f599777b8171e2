"""Runs over many images: rows, partial files, resuming, several hosts."""
