"""Segmentations of one slide, measured and compared."""
