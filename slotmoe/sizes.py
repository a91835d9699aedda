"""Bytes as people write and read them."""

import re

from slotmoe.errors import PlanError

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", 1):
    _UNITS |= {f"{_letter}B": 1000**_power, _letter: 1024**_power, f"{_letter}IB": 1024**_power}


def parse_size(text: str | float) -> int:
    """Bytes of ``8GiB``, ``7.5GB`` or ``512MiB``; an integer is bytes.  Raises ``PlanError``."""
    quoted, advice = f"{str(text)[:40]!r}", "write it like 8GiB, 7.5GB or 512MiB"
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*([A-Za-z]*)\s*", str(text))
    if not match or match[2].upper() not in _UNITS:
        raise PlanError(f"{quoted} is not a size; {advice}")
    size = float(match[1]) * _UNITS[match[2].upper()]
    if not 0 < size < 1 << 60:
        raise PlanError(f"{quoted} is not a possible size; {advice}")
    if isinstance(text, str) and not match[2] and size < 1 << 20:
        raise PlanError(f"{quoted} is {int(size)} bytes; write the unit, like {match[1]}GiB")
    return int(size)


def format_size(count: float) -> str:
    """``count`` bytes for people: ``12.3 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def size_option(size: int, sign: int = 1) -> str:
    """A size option of at most ``size`` bytes, with -1 of at least so many, to the tenth of a GiB
    or the MiB."""
    tenths, mebibytes = (sign * (sign * size * unit >> 30) for unit in (10, 1024))
    return f"{tenths / 10:.1f}GiB" if size >= 1 << 30 else f"{mebibytes}MiB"
