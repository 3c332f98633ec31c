"""Executors: run any plan."""

from pushforward.execute.sequential import Noise, Progress, check_start, run

__all__ = ["Noise", "Progress", "check_start", "run"]
