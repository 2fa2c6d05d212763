"""Prices of computers by the hour and of disks by the month."""

from pathlib import Path
from typing import Any

from cellquilt.core.errors import CellquiltError

PRICES = Path(__file__).with_name("prices.yml")
_PRICE_KEYS = ("cpu_h", "memory_gb_h", "gpu_h", "storage_gb_month")


def read_prices(path: Path) -> dict[str, Any]:
    """Prices of some offers.

    Raises
    ------
    CellquiltError
        ``prices-invalid``.
    """
    import yaml  # of the extra `report`

    def wrong(why: str) -> CellquiltError:
        return CellquiltError("prices-invalid", f"{path.name} {why}", "start from a copy of assets/prices.yml")

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise wrong(f"cannot be read: {str(error).splitlines()[0]}") from error
    offers = found.get("offers") if isinstance(found, dict) else None
    if not isinstance(offers, dict) or not offers:
        raise wrong("has no offers")
    for name, price in offers.items():
        if not isinstance(price, dict) or set(price) - set(_PRICE_KEYS):
            raise wrong(f'offer "{name}" may have {", ".join(_PRICE_KEYS)}')
        for key, value in price.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
                raise wrong(f'offer "{name}": {key} is {value!r}, a number from 0 on was expected')
    return {"offers": offers, "currency": str(found.get("currency", "")), "date": str(found.get("date", ""))}
