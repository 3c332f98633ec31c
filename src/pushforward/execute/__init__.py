"""Executors: run any plan."""

from pushforward.execute.adaptive import adaptive
from pushforward.execute.adjoint import Exact, Gradient, Implicit, Phantom, Skeleton, differentiable
from pushforward.execute.anderson import Mixing
from pushforward.execute.encode import Encoded, encode
from pushforward.execute.inverse import INVERSE, invert
from pushforward.execute.parallel import PARALLEL_METHODS, Parallel, Round, Solution, parallel
from pushforward.execute.sequential import Noise, Progress, check_start, run, steps

__all__ = [
    "INVERSE", "PARALLEL_METHODS", "Encoded", "Exact", "Gradient", "Implicit", "Mixing", "Noise",
    "Parallel", "Phantom", "Progress", "Round", "Skeleton", "Solution", "adaptive", "check_start", "differentiable",
    "encode", "invert", "parallel", "run", "steps",
]  # fmt: skip
