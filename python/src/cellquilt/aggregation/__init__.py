"""From cells to numbers: transcripts per cell and gene, channel intensities per cell, and the cell table."""
