"""How many nodes to take at once when the rounds are few: more nodes err less when solved, and need more rounds.

Evidence: `benchmarks/latency.py`.
"""

from __future__ import annotations

from bisect import bisect_right

from pushforward.data.words import many
from pushforward.errors import PushforwardError

LEAST, EACH, MORE = 12, 2, 4  # calls: no fewer than the first, else so many for every round and some more


def nodes_in(rounds: int, evaluations: int | None = None) -> int:
    """Return the network calls that a plan should make to give the best image in so many rounds.

    Where `evaluations` are too few for more calls than rounds, it makes them one after another.

    Args:
        rounds: batched network calls, one after another.
        evaluations: network evaluations of an image, at most; by default as many as it takes.
    """
    best = max(LEAST, EACH * rounds + MORE)
    if evaluations is None:
        return best
    afforded = bisect_right(range(best + 1), evaluations, key=lambda nodes: spent(nodes, rounds)) - 1
    return afforded if afforded > rounds else min(rounds, evaluations)


def spent(nodes: int, rounds: int) -> int:
    """Return the most evaluations of an image that rounds on all nodes take: one node more is exact after each."""
    most = min(nodes, rounds)
    return most * nodes - most * (most - 1) // 2


def window_in(nodes: int, rounds: int, evaluations: int | None, *, implicit: bool = False) -> int | None:
    """Return the most nodes to ask in a round for an image to cost no more than `evaluations`; `None`: all.

    Raises:
        PushforwardError: there are too few evaluations for so many nodes.
    """
    most = nodes * rounds if implicit else spent(nodes, rounds)
    if evaluations is None or most <= evaluations:
        return None
    if nodes <= min(rounds, evaluations) and not implicit:
        return 1
    raise PushforwardError(
        f"{many(rounds, 'round')} on the plan's {many(nodes, 'call')} may take {many(most, 'evaluation')} per image, "
        f"more than the {evaluations} allowed: take fewer steps or rounds, or allow more evaluations."
    )
