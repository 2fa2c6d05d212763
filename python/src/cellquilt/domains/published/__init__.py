"""The published recipe (Blampey et al., Nature Methods 2025): graph attention, trained by swapped assignments."""
