"""What a plan costs beside the network: 50 steps on 16 images of 3 x 32 x 32.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --quick    # fewer steps beside the U-Net

Beside a U-Net of `diffusers` (2.3 M parameters), everything outside its forward pass is counted: the executor, the
prediction's change into a denoised state, the change of basis. With a free network the same is measured alone, in
microseconds a step; that of the U-Net's run is larger, for its caches are cold. Processor time of the one thread, so
that other work on the machine does not matter; medians over steps (U-Net) or runs (free).
"""

from __future__ import annotations

import argparse
import math
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import torch
from _common import table, write_json, write_text
from torch import Tensor

from pushforward.execute import Parallel, run
from pushforward.execute.parallel import parallel, system_of
from pushforward.linear import VP, Basis, Blurring, BlurringLangevin, Gaussian, Langevin, Process
from pushforward.model import Network
from pushforward.plan import Plan, auto, ddim, exponential, gddim, grid

SHAPE = (16, 3, 32, 32)
ROWS = 12
REFERENCE = Gaussian(0.25)
SOLVERS: dict[str, Callable[[Process, int], Plan]] = {
    "DDIM": lambda process, steps: ddim(process, grid.power(process, steps)),
    "gDDIM 2": lambda process, steps: gddim(process, grid.power(process, steps), order=2),
    "exponential 2": lambda process, steps: exponential(process, grid.angle(process, steps), order=2),
    "auto": lambda process, steps: auto(process, steps, REFERENCE),
}


class Timed:
    """A network that adds up the time spent in it, and notes when each call began and ended."""

    def __init__(self, module: Callable[[Tensor, Tensor], Tensor]):
        self.module = module
        self.calls: list[tuple[float, float]] = []

    def __call__(self, u: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        del condition
        began = time.thread_time()
        answer = self.module(u, t)
        self.calls.append((began, time.thread_time()))
        return answer


def unet() -> Callable[[Tensor, Tensor], Tensor]:
    """A small U-Net for an image, or an image and its velocity, that gives an image."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    module = UNet2DModel(
        sample_size=32, in_channels=6, out_channels=3, layers_per_block=1, block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"), norm_num_groups=8,
    ).eval()  # fmt: skip

    def predict(u: Tensor, t: Tensor) -> Tensor:
        both = u if u.shape[1] == 6 else torch.cat([u, u], 1)
        return module(both, t).sample

    predict.parameters = sum(p.numel() for p in module.parameters())  # type: ignore[attr-defined]
    return predict


def network(module: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Network:
    """As our own models have it: EDM's preconditioning."""
    return Network(module, prediction="residual", time_scale=1000, reference=REFERENCE, input_reference=REFERENCE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--quick", action="store_true", help="10 steps beside the U-Net")
    parser.add_argument("--repeats", type=int, default=5, help="runs with the free network")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    heavy = unet()
    rows = []
    for process in (VP(), Blurring(SHAPE[2:]), Langevin()):
        for name, solver in SOLVERS.items():
            rows.append([process.name, name, *measure(process, partial(solver, process), heavy, arguments)])
            print(*rows[-1], flush=True)
    columns = ["process", "solver", "plan (ms)", "free (us)", "beside U-Net (us)", "U-Net (ms)", "share (%)"]
    text = table(columns, rows)
    worst = max(row[-1] for row in rows)
    text += f"\n\nLargest share of the time outside the network: {worst:.2f} % (the target is below 2 %).\n"
    print("\n" + text)
    if not arguments.quick:
        text += f"\n## All steps at once\n\nDDIM beside a free network, at most {ROWS} rows a call; one image, "
        text += "a reference with a spectrum.\nIn units of all states: the peak over what the process took before. "
        text += "Of the U-Net: a round, in percent of the U-Net's time for all steps.\n\n"
        text += at_once() + "\n\n## First build\n\n`auto` with 100 steps and its system, images of 3 x 32 x 32.\n\n"
        text += first_builds() + "\n"
    title = f"# Time beside the network\n\n{arguments.steps} steps, images {SHAPE}, float32; times a step."
    write_text("overhead", f"{title}\n\n{text}")
    write_json("overhead", {"steps": arguments.steps, "columns": columns, "rows": rows})


def at_once() -> str:
    """A table of what solving all steps at once costs, as images and steps grow."""
    rows = []
    for side, steps in ((32, 50), (32, 100), (32, 1000), (128, 50), (256, 50), (512, 50)):
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            rows.append([f"3 x {side} x {side}", steps, *pool.submit(solved, side, steps).result()])
            print(*rows[-1], flush=True)
    columns = [
        "image", "steps", "set up (s)", "round (ms)", "us per 1000 numbers", "peak (MB)", "in states", "of U-Net (%)"
    ]  # fmt: skip
    return table(columns, rows)


def first_builds() -> str:
    """A table of what a plan and its system cost to make for the first time."""
    rows = []
    for process in (VP(), Blurring(SHAPE[2:]), Langevin(), BlurringLangevin(field=SHAPE[2:])):
        for name, reference in (("white", REFERENCE), ("a spectrum", spectral(SHAPE[2]))):
            began = time.thread_time()
            plan = auto(process, 100, reference)
            made = time.thread_time()
            like = torch.zeros(1, SHAPE[1] * process.blocks, *SHAPE[2:])
            system_of(plan, "gaussian", reference, like)
            rows.append([process.name, name, made - began, time.thread_time() - made])
            print(*rows[-1], flush=True)
    return table(["process", "reference", "plan (s)", "system (s)"], rows)


def spectral(side: int) -> Gaussian:
    """A reference with a spectrum, of unit variance."""
    spectrum = 1 / (1 + 100 * Basis((side, side)).eigenvalues())
    return Gaussian(spectrum / spectrum.mean())


def solved(side: int, steps: int) -> list[float | None]:
    """Seconds to set up; milliseconds a round, in all and a thousand numbers; peak memory, in MB and in states.

    Last, up to 128 pixels, a round in percent of the time that the U-Net takes for all steps.
    """
    torch.set_num_threads(1)
    process, reference = VP(), spectral(side)
    plan = ddim(process, grid.power(process, steps))
    start = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    module = Timed(lambda u, _: 0.1 * u)
    method = Parallel(reference=reference, max_rows=ROWS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.thread_time()
    system_of(plan, method.response, reference, start)
    ready = time.thread_time()
    rounds = parallel(plan, network(module), start, method=method).rounds
    inside = sum(end - begin for begin, end in module.calls)
    each = 1e3 * (time.thread_time() - ready - inside) / rounds
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    states = start.nbytes * (steps + 1) / 1024
    share = 100 * each / (1e3 * math.ceil(steps / ROWS) * call(side)) if side <= 128 else None
    return [ready - began, each, 1e6 * each / (start.numel() * steps), peak / 1024, (peak - before) / states, share]


def call(side: int) -> float:
    """Seconds that the U-Net takes for the most rows of one call, the median of three."""
    module, u = Timed(unet()), torch.randn(ROWS, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for _ in range(4):
            module(u, torch.full((ROWS,), 500.0), None)
    return statistics.median(end - begin for begin, end in module.calls[1:])


def measure(
    process: Process,
    solver: Callable[[int], Plan],
    heavy: Callable[[Tensor, Tensor], Tensor],
    arguments: argparse.Namespace,
) -> list[float]:
    """Milliseconds to make the plan; microseconds a step, free and beside the U-Net; its milliseconds; percent."""
    shape = (SHAPE[0], process.blocks * SHAPE[1], *SHAPE[2:])
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    solver(3)  # loads what is loaded on first use
    began = time.thread_time()
    plan = solver(arguments.steps)
    made = time.thread_time() - began
    answer = 0.1 * start[:, : SHAPE[1]]
    free = []
    for _ in range(arguments.repeats + 1):
        module = Timed(lambda *_: answer)
        began = time.thread_time()
        with torch.no_grad():
            run(plan, network(module), start)
        free.append((time.thread_time() - began) / plan.nfe)
    module = Timed(heavy)
    with torch.no_grad():
        run(solver(10) if arguments.quick else plan, network(module), start)
    inside = statistics.median(end - begin for begin, end in module.calls)
    between = [after[0] - before[1] for before, after in zip(module.calls[:-1], module.calls[1:], strict=True)]
    beside, alone = statistics.median(between), statistics.median(free[1:])
    return [1e3 * made, 1e6 * alone, 1e6 * beside, 1e3 * inside, 100 * beside / (inside + beside)]


if __name__ == "__main__":
    main()
