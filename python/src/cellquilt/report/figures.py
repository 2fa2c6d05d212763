"""matplotlib figures inside a page: as SVG with the page's own font and colours, light, dark or printed."""

import io
import re
from html import escape
from typing import TYPE_CHECKING

from cellquilt.domains.plots import CARD, GRID, INK, SOFT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: What the figures' neutral colours are on a page.
_PAGE = {INK: "var(--ink)", SOFT: "var(--soft)", GRID: "var(--grid)", CARD: "var(--card)"}


def figure_svg(figure: "Figure", label: str) -> str:
    """A figure as an inline SVG element, the same bytes every time.

    Parameters
    ----------
    figure
        In the style of `cellquilt.domains.plots`.
    label
        What it shows, for those who do not see it.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label, "svg.image_inline": True}):
        about = {"Date": None, "Creator": None}
        figure.savefig(buffer, format="svg", facecolor="none", bbox_inches="tight", pad_inches=0.06, metadata=about)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    # Only what is referred to needs a name: names are one space for the whole page.
    used = set(re.findall(r"url\(#([^)]+)\)", text)) | set(re.findall(r'xlink:href="#([^"]+)"', text))
    text = re.sub(r' id="([^"]*)"', lambda found: found.group() if found.group(1) in used else "", text)
    text = text.replace("xlink:href", "href")
    for colour, name in _PAGE.items():
        text = text.replace(colour, name)
    size = re.search(r'viewBox="0 0 ([0-9.]+) ([0-9.]+)"', text)
    assert size is not None
    width, height = (float(part) for part in size.groups())
    head = (
        f'<svg class="figure" viewBox="0 0 {width:g} {height:g}" style="max-width:{width * 96 / 72:.0f}px" role="img" '
        f'aria-label="{escape(label)}">'
    )
    return head + text[text.index(">") + 1 :].strip()
