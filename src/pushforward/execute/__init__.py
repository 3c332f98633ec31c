"""Executors: run any plan."""

from pushforward.execute.adaptive import Adaptive, adaptive
from pushforward.execute.sequential import Noise, Progress, check_start, run

__all__ = ["Adaptive", "Noise", "Progress", "adaptive", "check_start", "run"]
