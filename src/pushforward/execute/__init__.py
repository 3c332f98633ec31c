"""Executors: run any plan."""

from pushforward.execute.adaptive import adaptive
from pushforward.execute.sequential import Noise, Progress, check_start, run

__all__ = ["Noise", "Progress", "adaptive", "check_start", "run"]
