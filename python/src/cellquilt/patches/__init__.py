"""Patches: the grid, the intensity normalisation of a slide, and the bundles that patch tasks are handed."""
