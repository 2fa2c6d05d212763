"""From the cells of many patches to one cell each: choose between copies, split overlaps, grow nuclei to cells."""
