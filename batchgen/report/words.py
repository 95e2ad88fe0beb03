"""Numbers as a person reads them."""

from __future__ import annotations

import time


def duration(seconds: float) -> str:
    """A time span with its two largest units; parts of a second if it is short."""
    if not seconds:
        return "0 s"
    if seconds < 0.01:
        return f"{1000 * seconds:.1f} ms"
    if seconds < 10:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60} h"
    hours = round(seconds / 3600)
    return f"{hours // 24} days {hours % 24} h" if hours % 24 else f"{hours // 24} days"


def machine_time(seconds: float) -> str:
    """Time of machines together, in hours as they are paid for, if it is more than a few."""
    return f"{seconds / 3600:,.0f} h" if seconds >= 10 * 3600 else duration(seconds)


def counted(number: float) -> str:
    """A count with its thousands set apart."""
    return f"{number:,.0f}"


def rate(number: float) -> str:
    """A speed; below ten with two digits, so that a slow one is not taken for none."""
    return counted(number) if number >= 9.95 or not number else f"{number:.2g}"


def plural(number: int, singular: str, plural_form: str = "") -> str:
    """A count with its noun."""
    return f"{number:,} {singular if number == 1 else plural_form or singular + 's'}"


def percent(part: float, whole: float) -> str:
    """A share; below one in a hundred with more digits, so that it is not taken for none."""
    share = 100 * part / whole if whole else 0.0
    number = f"{share:.0f}" if share >= 9.5 or not share else f"{share:.2g}"
    return f"{number}\N{NO-BREAK SPACE}%"


def size_of(size: float) -> str:
    """Bytes, in decimal units."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}" if size < 100 * unit else f"{size / unit:,.0f} {name}"
    return f"{size:.0f} bytes"


def moment(at: float) -> str:
    """A Unix time, in this machine's time zone."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
