"""Shapes and pixels: polygons as flat arrays, outlines of labels, rasterising, expanding, locating points."""
