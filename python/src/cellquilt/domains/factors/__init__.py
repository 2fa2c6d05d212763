"""The own recipe: what neighbours share, in closed form. No network, no chance but in the choice of a sample.

1. `sensitivity`: how much more or less of a gene a slide shows than others do, given the states of its cells.
2. `analysis`: factors of expression, so that cells of any panel have the same few numbers.
3. `directions`: the directions in which cells some hops apart are alike: what is of the place and not of the cell.
4. `smoothing`: means over neighbours that stop at borders.
"""

from cellquilt.domains.factors.encoder import FactorEncoder
from cellquilt.domains.factors.fit import fit_factors

__all__ = ["FactorEncoder", "fit_factors"]
