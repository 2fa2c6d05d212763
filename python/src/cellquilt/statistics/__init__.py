"""Statistics whose unit is the sample: groups compared by permuting samples, shares that sum to 1, many tests."""
