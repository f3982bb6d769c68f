"""How numbers are written on the page: few digits, units spelled out, and a dash for what was not measured."""

from __future__ import annotations

import math
from typing import TypeGuard

MISSING = "–"


def count(value: float | None) -> str:
    """A count with thin thousands separators: 21345 -> '21,345'."""
    return MISSING if not _there(value) else f"{value:,.0f}"


def figure(value: float | None) -> str:
    """Any measured number to three digits, thousands whole: 0.12345 -> '0.123', 327680 -> '327,680'."""
    if not _there(value):
        return MISSING
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def short(value: float | None) -> str:
    """A count to three digits: 921600 -> '922 k', 4.1e6 -> '4.1 M'."""
    if not _there(value):
        return MISSING
    for factor, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.3g}"


def size(value: float | None) -> str:
    """Bytes in binary units: 4096 -> '4 KiB'."""
    if not _there(value):
        return MISSING
    for factor, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= factor:
            return f"{_digits(value / factor)} {unit}"
    return f"{value:.0f} B"


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def duration(value: float | None) -> str:
    """Seconds in the unit that reads best: 0.00061 -> '610 µs', 75 -> '75 s', 233 -> '3.9 min'."""
    if not _there(value):
        return MISSING
    if value < 1e-3:
        return f"{value * 1e6:.3g} µs"
    if value < 1:
        return f"{value * 1e3:.3g} ms"
    return f"{value:.3g} s" if value < 100 else f"{value / 60:.1f} min"


def accuracy(value: float | None) -> str:
    """A fraction to three places: 0.9981 -> '0.998'. Only an exact 1 is printed as 1.000."""
    if not _there(value):
        return MISSING
    # Rounding 0.9996 up would claim a perfect score that was not reached.
    return f"{value:.3f}" if value >= 1 or value < 0.9995 else "0.999"


def bits(value: float | None) -> str:
    """Bits per byte to three places."""
    return MISSING if not _there(value) else f"{value:.3f}"


def ratio(value: float) -> str:
    """A factor: 128.0 -> '128×', 1.04 -> '1.0×'."""
    return f"{value:,.0f}×" if value >= 10 else f"{value:.1f}×"


def plural(number: int, noun: str) -> str:
    """'1 run', '2 runs'."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def listing(names: list[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _there(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)
