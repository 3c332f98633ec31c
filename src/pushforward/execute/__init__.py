"""Executors: run any plan."""

from pushforward.execute.adaptive import Adaptive, adaptive
from pushforward.execute.mixing import Mixing
from pushforward.execute.parallel import METHODS, Parallel, Round, Solution, parallel
from pushforward.execute.sequential import Noise, Progress, check_start, run

__all__ = [
    "METHODS", "Adaptive", "Mixing", "Noise", "Parallel", "Progress", "Round", "Solution", "adaptive", "check_start",
    "parallel", "run",
]  # fmt: skip
