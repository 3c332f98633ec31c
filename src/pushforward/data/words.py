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


def few(names: Iterable[str]) -> str:
    """Join the first eight of some names, and say how many more there are."""
    every = list(names)
    return ", ".join(every[:8]) + f" and {len(every) - 8} more" * (len(every) > 8)
