r"""How long a network call takes by its rows, measured, and which way of running a plan is therefore the fastest.

All steps at once are fewer calls of many rows each. Whether that is faster is a matter of the machine: a GPU answers
hundreds of rows in nearly the time of one, a CPU takes nearly a hundred times as long for a hundred. So: measure,
predict, choose.

    sequential    nfe seconds(batch)
    all at once   R seconds(asked nfe batch)               R = rounds(nfe)
    window w      R more seconds(asked w batch)

`asked` is the part of all rows that a round asks on average, for settled steps are not asked again; a smaller window
needs more rounds, by the factor `more` (both in `WINDOWS`). What executors do between the calls is not counted.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from pushforward.data import schema
from pushforward.data.files import atomic_path, cache_folder
from pushforward.denoiser import Ask, Denoiser, Priced
from pushforward.errors import PushforwardError
from pushforward.execute.distributed import Sharded, same, size
from pushforward.execute.parallel import PARALLEL_METHODS, Parallel
from pushforward.linear import Process
from pushforward.plan import Plan

BATCHES = tuple(2**i for i in range(10))  # 1 to 512
SLOW = 0.5  # seconds of a call after which no larger one is measured
BUDGET = 3.0  # seconds for all measurements, about
REPEATS = 5

# For windows of 1 / parts of the steps: how many times the rounds, and the part of the window that a round asks. As
# found on a mixture and on an embedded network, with 50 to 200 steps.
WINDOWS = {1: (1.0, 0.6), 2: (1.3, 0.8), 4: (2.0, 0.9)}
SHRINK = 4.5  # how much one more round shrinks the error


@dataclass(frozen=True)
class Latency:
    """Seconds of a network call by its rows.

    Args:
        batches: rows, increasing; the largest is the most that one call should have.
        seconds_a_call: seconds of one call with so many rows.

    Raises:
        PushforwardError: there are none, not as many, or some that are not positive or not increasing.
    """

    batches: tuple[int, ...]
    seconds_a_call: tuple[float, ...]

    def __post_init__(self) -> None:
        rows, seconds = self.batches, self.seconds_a_call
        rising = all(a < b for a, b in zip((0, *rows), rows, strict=False))
        timed = all(0 < s < math.inf for s in seconds)
        if not rows or len(rows) != len(seconds) or not rising or not timed:
            raise PushforwardError(
                f"Latencies need increasing batch sizes and as many positive seconds; got {rows} and {seconds}."
            )

    @property
    def largest(self) -> int:
        """The most rows of one call."""
        return self.batches[-1]

    def seconds(self, rows: float, most: int | None = None) -> float:
        """Interpolate the seconds for `rows`: in one call, or several of at most `most` and at most `largest` rows."""
        full = min(most or self.largest, self.largest)
        calls, rest = divmod(max(rows, 0), full)
        return calls * self._one(full) + (self._one(rest) if rest else 0.0)

    def shared(self, ranks: int) -> Latency:
        """Return the same where every call's rows are shared over `ranks` machines like this one (see `Sharded`)."""
        return replace(self, batches=tuple(rows * ranks for rows in self.batches))

    def _one(self, rows: float) -> float:
        after = bisect_left(self.batches, rows)
        if after == 0:
            return self.seconds_a_call[0]
        (a, b), (s, t) = self.batches[after - 1 : after + 1], self.seconds_a_call[after - 1 : after + 1]
        return s + (t - s) * (rows - a) / (b - a)


@dataclass(frozen=True)
class _Stored:
    """A latency as its file has it."""

    about: dict[str, Any]
    batches: tuple[int, ...]
    seconds: tuple[float, ...]


@torch.no_grad()
def measure(denoiser: Denoiser, process: Process, like: Tensor, batches: Sequence[int] = BATCHES) -> Latency:
    """Time network calls of growing size, for about `BUDGET` seconds at most beyond the first size.

    Each size gets a call to warm up and the median of a few. It ends with the first size whose call takes longer than
    `SLOW`, or when the next would exceed the budget, or fails: a call too large for the memory.

    Args:
        denoiser: the network. `Sharded` several ranks, each measures its own and all take the first one's.
        process: the diffusion.
        like: a state `(batch, k * channels, *field)`, for shape, dtype, device; rows are copies of its first.
        batches: sizes to try, increasing.

    Raises:
        PushforwardError: the sizes are not increasing.
    """
    if isinstance(denoiser, Sharded):
        inner = measure(denoiser.inner, process, like, batches)
        return same(inner, denoiser.group).shared(size(denoiser.group))
    middle = torch.tensor([(process.t_min + process.t_max) / 2], dtype=torch.float64, device="cpu")
    ask = denoiser.at(process, middle, like)
    seconds: list[float] = []
    began = time.perf_counter()
    for rows in batches:
        if seconds:
            growth = max(2.0, rows / batches[len(seconds) - 1])
            spent = time.perf_counter() - began
            if seconds[-1] > SLOW or spent + 2 * growth * seconds[-1] > BUDGET:
                break
        try:
            seconds.append(_median(ask, like, rows))
        except RuntimeError:  # of the memory, or of a size beyond what a kernel can index
            if not seconds:
                raise
            if like.device.type == "cuda":
                torch.cuda.empty_cache()
            break
    return Latency(tuple(batches[: len(seconds)]), tuple(seconds))


def measured(
    denoiser: Denoiser,
    process: Process,
    like: Tensor,
    batches: Sequence[int] = BATCHES,
    folder: Path | None = None,
) -> Latency:
    """As `measure`, but once: kept in the user's cache, by machine and network.

    A denoiser that does not say what its calls cost (`Priced`) is measured each time.

    Args:
        denoiser: the network.
        process: the diffusion.
        like: a state `(batch, k * channels, *field)`.
        batches: sizes to try, increasing.
        folder: folder of the cache; by default `$XDG_CACHE_HOME/pushforward` or `~/.cache/pushforward`. Delete it to
            measure again. Damaged entries are measured again; if it cannot be written to, nothing is kept.
    """
    if isinstance(denoiser, Sharded):
        inner = measured(denoiser.inner, process, like, batches, folder)
        return same(inner, denoiser.group).shared(size(denoiser.group))
    key = _key(denoiser, process, like, batches)
    if key is None:
        return measure(denoiser, process, like, batches)
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = (folder or cache_folder()) / f"latency-{name}.json"
    found = read(path)
    if found is None:
        found = measure(denoiser, process, like, batches)
        write(found, path, about=key)
    return found


@dataclass(frozen=True)
class Choice:
    """The fastest way to run a plan.

    Args:
        method: how to run it with all steps at once, or `None`: one after another.
        seconds: predicted for each way: "sequential", "parallel", "window 25" ….
        reason: one line that says why.
    """

    method: Parallel | None
    seconds: Mapping[str, float]
    reason: str


def rounds_expected(nfe: int, tolerance: float = 1e-3) -> float:
    """Return the rounds to the tolerance for a plan of `nfe` calls: at most `nfe`, after which the result is exact.

    From runs of trained networks: to 1e-3, about 8 for 50 steps, 9 for 100 and 10 for 1000.
    """
    rounds = 8 + 1.5 * math.log10(max(nfe, 1) / 50) + math.log(1e-3 / tolerance) / math.log(SHRINK)
    return float(min(max(rounds, 1.0), nfe))


def choose(
    plan: Plan,
    latency: Latency,
    batch: int,
    *,
    method: Parallel = PARALLEL_METHODS["preconditioned"],
    rounds: Callable[[int, float], float] = rounds_expected,
) -> Choice:
    """Predict how long each way of running `plan` takes, and choose the fastest.

    Args:
        plan: of any solver; one with terms that look ahead can only be run with all steps at once.
        latency: latency of the network on this machine.
        batch: images at a time.
        method: how the plan would be run with all steps at once; its `window` is chosen here, and its `max_rows` made
            no larger than the largest call that was measured, if calls would be larger.
        rounds: `(nfe, tolerance) -> rounds` expected with all steps at once.

    Raises:
        PushforwardError: the batch is empty.
    """
    if batch < 1:
        raise PushforwardError(f"Choosing how to run a plan needs a batch of at least 1 image; got {batch}.")
    nfe, expected = plan.nfe, rounds(plan.nfe, method.tolerance)
    most = min(method.max_rows or latency.largest, latency.largest)
    ways: dict[str, Parallel | None] = {}
    seconds: dict[str, float] = {}
    if not plan.implicit:
        together = (sum(plan.nodes[k].asks for k in wave) for wave in plan.waves)
        ways["sequential"], seconds["sequential"] = None, sum(latency.seconds(n * batch) for n in together if n)
    for parts, (more, asked) in WINDOWS.items():
        steps = nfe // parts
        if parts > 1 and (plan.implicit or steps < 2):
            continue
        name = "parallel" if parts == 1 else f"window {steps}"
        capped = most if steps * batch > most else method.max_rows
        ways[name] = replace(method, window=None if parts == 1 else steps, max_rows=capped)
        rows = max(asked, (nfe + 1) / (2 * nfe)) * steps * batch  # few steps: only one settles a round
        seconds[name] = min(more * expected, nfe) * latency.seconds(rows, capped)
    best = min(seconds, key=lambda name: seconds[name])  # the first of equals: sequential
    return Choice(ways[best], seconds, _reason(best, seconds, latency, nfe, batch))


def read(path: Path) -> Latency | None:
    """Return a latency from its file, or `None` if there is none that can be read."""
    try:
        stored = schema.read(path, _Stored, "remove it")
        return Latency(stored.batches, stored.seconds)
    except PushforwardError:
        return None


def write(latency: Latency, path: Path, about: Mapping[str, object] | None = None) -> None:
    """Keep a latency in a file, whole or not at all; what cannot be written is not kept.

    Args:
        latency: what to keep.
        path: the file.
        about: what was measured, for readers.
    """
    stored = {"about": about or {}, "batches": latency.batches, "seconds": latency.seconds_a_call}
    with suppress(OSError), atomic_path(path) as temporary:
        temporary.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")


def _reason(best: str, seconds: Mapping[str, float], latency: Latency, nfe: int, batch: int) -> str:
    rows = nfe * batch
    cost = latency.seconds(rows) / latency.seconds(batch)
    why = f"{rows} evaluations at once cost {cost:.2g} times {'one' if batch == 1 else batch}"
    if "sequential" not in seconds:
        return "an implicit plan is run with all steps at once"
    if best == "sequential":
        least = min((value for name, value in seconds.items() if name != best))
        return f"parallel would take {least / seconds[best]:.2g} times as long here: {why}; running sequentially"
    gain = seconds["sequential"] / seconds[best]
    some = "" if best == "parallel" else f", in a {best} steps wide"
    return f"parallel should be {gain:.2g} times as fast here: {why}; running all steps at once{some}"


def _median(ask: Ask, like: Tensor, rows: int) -> float:
    """Return seconds of one call, after one to warm up."""
    u = like[:1].expand(rows, *like.shape[1:]).contiguous()
    k = of = torch.zeros(rows, dtype=torch.long, device=like.device)
    found: list[float] = []
    began = math.inf
    for call in range(REPEATS + 1):
        started = _now(like.device)
        ask(k, u, of)
        ended = _now(like.device)
        if call == 0:
            began = ended
            continue
        found.append(ended - started)
        if ended - began > BUDGET / 2 / len(BATCHES):
            break
    return max(median(found), 1e-9)


def _now(device: torch.device) -> float:
    """Return the time when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _key(denoiser: Denoiser, process: Process, like: Tensor, batches: Sequence[int]) -> dict[str, object] | None:
    """Return what latencies depend on, or `None` for a denoiser that cannot be told from others."""
    price = denoiser.price() if isinstance(denoiser, Priced) else None
    if price is None:
        return None
    return {
        "device": torch.cuda.get_device_name(like.device) if like.device.type == "cuda" else _processor(),
        "type": like.device.type,
        "torch": torch.__version__,
        "dtype": str(like.dtype),
        "state": list(like.shape[1:]),
        "process": process.name,
        "threads": torch.get_num_threads(),
        **price,
        "batches": list(batches),
    }


def _processor() -> str:
    """Name of the processor, as far as the system tells."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
