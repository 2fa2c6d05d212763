"""The way out: cells as the files that other programs read."""
