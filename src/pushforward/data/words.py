"""Words of sentences that users read."""

from collections.abc import Iterable

__all__ = ["few", "many"]


def many(count: float, what: str) -> str:
    """Say how many there are, to the nearest whole number.

    >>> many(1, "image"), many(12_000, "image")
    ('1 image', '12,000 images')
    """
    number = f"{count:,.0f}"
    return f"{number} {what}{'s' * (number != '1')}"


def few(names: Iterable[str], most: int = 8) -> str:
    """Join the first of some names, and say how many more there are."""
    every = list(names)
    return ", ".join(every[:most]) + f" and {len(every) - most} more" * (len(every) > most)
