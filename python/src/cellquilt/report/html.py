"""How the pages' templates are filled in."""

import json
from collections.abc import Mapping
from typing import Any

from cellquilt.report.plots import number, percent


def environment() -> Any:
    """The templates, with numbers and charts as filters; a name that is not there is an error."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    found = Environment(
        loader=PackageLoader("cellquilt.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"number": number, "percent": percent, "svg": Markup}
    return found


def embedded(data: Mapping[str, Any]) -> Any:
    """JSON that may stand inside a script element."""
    from markupsafe import Markup

    text = json.dumps(data, sort_keys=True, ensure_ascii=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
