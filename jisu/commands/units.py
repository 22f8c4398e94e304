"""Numbers for people."""

from __future__ import annotations


def nbytes(value: float | None) -> str:
    """Bytes in powers of 1024, three digits: "3.19 MiB"."""
    if value is None:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1000:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"


def seconds(value: float | None) -> str:
    """Seconds with a fitting prefix, three digits: "12.3 ms"."""
    if value is None:
        return "-"
    for factor, unit in ((1e9, "ns"), (1e6, "µs"), (1e3, "ms")):
        if abs(value) * factor < 1000:
            return f"{value * factor:.3g} {unit}"
    return f"{value:.3g} s" if abs(value) < 1000 else f"{value:,.0f} s"


def count(value: float | None) -> str:
    """A count in powers of 1000, three digits: "1.67 M"."""
    if value is None:
        return "-"
    for unit in ("", " k", " M", " G"):
        if abs(value) < 1000:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g} T"
