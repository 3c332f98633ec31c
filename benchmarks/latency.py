r"""How near to the converged image so many rounds of network calls come, and at how many evaluations.

A round is one batched network call: what a machine with lanes to spare waits for. A sequential solver makes one
evaluation a round, all steps at once make many. Each start's relative error against the flow's solution (`auto` with
`--fine` calls) is measured after R rounds; the tables say median / root mean square over the starts.

    python benchmarks/latency.py                            # everything that is not in results/latency.json yet
    python benchmarks/latency.py --cases fashion-vp --rounds 5 6 8
    python benchmarks/latency.py --cases mixture --methods "ours" "auto" --redo

*ours* is `Parallel(rounds=R)` with the plan that it chooses; *12 a round* is the same with `max_evaluations=12 R`;
*ours, plain* is without mixing; *ours, learned* is a plan learned from other images of the model (`learn_plan`): 64, or
256 (`--images`) on the Langevin diffusion. The peers' iterations run on the very plan that ours has: *ParaTAA*
(triangular mixing in the noise prediction), *DEQ* (Anderson's mixing a time step, as released) and *Picard* (ParaDiGMS
without a window). *EPD's form* is fitted to as many images (see _epd.py); a step of it is three evaluations in two
rounds. The sequential solvers, ours and those of `diffusers`, make R calls. Where the *mean* is *unknown*, no more is
known of the data than that they fill [-1, 1], as of the images of any pipeline.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import _epd
import torch
from _common import RESULTS, median, number, read_json, relative_errors, table, write_json, write_text
from _peers import Handed, Peer, run_peer
from parallel import model_of
from torch import Tensor

from pushforward import Diffusion, Model, load
from pushforward.data.files import atomic_path
from pushforward.data.plots import mark_plainly
from pushforward.errors import PushforwardError
from pushforward.execute import PARALLEL_METHODS, Parallel, parallel, run
from pushforward.execute.budget import nodes_in
from pushforward.linear import WHITE, Discrete, ScaledProcess
from pushforward.maps.code import GaussianStream
from pushforward.maps.labels import UNSAID
from pushforward.maps.spec import parse
from pushforward.plan import auto, in_rounds
from pushforward.plan.auto import auto_at
from pushforward.training.plans import flow_states, learn_plan, refined

UNKNOWN = ", mean unknown"
CASES = ("fashion-vp", "fashion-blurring", "fashion-langevin", "emoji", "mixture",
         "fashion-vp" + UNKNOWN, "emoji" + UNKNOWN)  # fmt: skip
ROUNDS = (3, 4, 5, 6, 8, 10, 12)
ALLOWED = 12  # evaluations a round, of the bounded row
TARGETS = {5: 3, 6: 4, 8: 6}  # how many times nearer than the best sequential solver, in the median

SEQUENTIAL = ("auto", "ddim", "dpm++:grid=angle", "unipc:grid=angle", "gddim:order=2", "gddim:order=3")
AT_ONCE: Mapping[str, Parallel] = {
    "ours": PARALLEL_METHODS["preconditioned"],
    "ours, 12 a round": PARALLEL_METHODS["preconditioned"],
    "ours, plain": PARALLEL_METHODS["plain"],
    "ParaTAA": PARALLEL_METHODS["triangular"],
    "DEQ": PARALLEL_METHODS["anderson"],
    "Picard": PARALLEL_METHODS["picard"],
}
LEARNED = ("ours, learned", "ours, learned, 12 a round")


def theirs() -> dict[str, Peer]:
    """Sequential schedulers of `diffusers`, with options that are usual for few calls."""
    import diffusers as d

    shared = {"solver_order": 2, "prediction_type": "epsilon", "use_karras_sigmas": True}
    return {
        "diffusers DDIM": Peer("", d.DDIMScheduler, {"prediction_type": "epsilon", "timestep_spacing": "trailing",
                                                     "clip_sample": False}),
        "diffusers DPM-Solver++ 2M": Peer("", d.DPMSolverMultistepScheduler, {**shared, "final_sigmas_type": "zero"}),
        "diffusers UniPC": Peer("", d.UniPCMultistepScheduler, {**shared, "final_sigmas_type": "zero"}),
        "diffusers DEIS": Peer("", d.DEISMultistepScheduler, shared),
    }  # fmt: skip


@dataclass(frozen=True, eq=False)
class Problem:
    """Starts on a model, and the images that the flow makes of them.

    Args:
        model: under its labels.
        unbound: the same without.
        start: terminal states.
        exact: clean states of the converged images.
    """

    model: Model
    unbound: Model
    start: Tensor
    exact: Tensor

    def errors(self, state: Tensor) -> Tensor:
        """Relative errors of clean states, `(starts,)`."""
        return relative_errors(self.model.process.image(state), self.exact)


def problem(source: str, starts: int, fine: int, data: Path | None) -> Problem:
    """Make the starts of a case, and its converged images."""
    name = source.removesuffix(UNKNOWN)
    model, unbound = model_of(name, starts, data), None if name == "mixture" else load(name)
    if name != source:
        model, unbound = (replace(one, reference=WHITE, statistics=None, means=None) for one in (model, unbound))
    dtype = torch.float64 if source == "mixture" else torch.float32
    plan = auto(model.process, fine, model.reference)
    stream = GaussianStream(0, range(starts), model.state_shape(1)[1:])
    start = Diffusion(model, plan, dtype=dtype).start(stream.draw())
    return Problem(
        model,
        unbound or model,
        start,
        model.process.image(run(plan, model.denoiser, start)),
    )


def sequential(problem: Problem, solver: str, rounds: int) -> tuple[Tensor, float] | None:
    """One of our solvers, step by step."""
    try:
        plan = parse(solver).calling(problem.model, rounds).plan(problem.model)
    except PushforwardError:
        return None
    return problem.errors(run(plan, problem.model.denoiser, problem.start)), plan.nfe


def scheduled(problem: Problem, peer: Peer, rounds: int) -> tuple[Tensor, float] | None:
    """A scheduler of `diffusers`, where it is defined."""
    process = problem.model.process
    if not isinstance(process, ScaledProcess | Discrete) or process.basis.shape or process.blocks > 1:
        return None
    state = run_peer(peer, Handed(process, problem.model.denoiser, problem.start), problem.start, rounds)
    return None if state is None else (problem.errors(state), rounds)


def at_once(problem: Problem, method: Parallel, rounds: int, allowed: int | None) -> tuple[Tensor, float]:
    """All steps at once, on the plan that the budget chooses."""
    model = problem.model
    plan = in_rounds(model.process, nodes_in(rounds, allowed), model.reference)
    method = replace(method, rounds=rounds, max_evaluations=allowed, reference=model.gaussian.tempered())
    solution = parallel(plan, model.denoiser, problem.start, method=method)
    return problem.errors(solution.last), float(solution.nfe.double().mean())


def learned(problem: Problem, images: int, name: str, rounds: int) -> tuple[Tensor, float] | None:
    """A plan that is learned first, from other images under the same labels in turn; none if it is no better."""
    labels, most = UNSAID if problem.model.classes else None, _allowed(name, rounds)
    try:
        plan = learn_plan(problem.unbound, rounds, max_evaluations=most, images=images, labels=labels, seed=1).plan
    except PushforwardError as error:
        print(error, flush=True)
        return None
    return problem.errors(run(plan, problem.model.denoiser, problem.start)), plan.nfe


def epd(problem: Problem, images: int, rounds: int) -> tuple[Tensor, float] | None:
    """EPD-Solver's form, fitted to other images under the same labels in turn; of two grids the better one on these."""
    process, reference = problem.model.process, problem.model.reference
    if rounds < 3 or not isinstance(process, ScaledProcess) or process.basis.shape:
        return None
    free, steps, found = rounds % 2 == 1, (rounds + 1) // 2, []
    for grid in _epd.grids(process, steps, reference):
        times = _epd.times(process, grid)
        fine = auto_at(process, refined(times), reference=reference)
        labels = UNSAID if problem.model.classes else None
        there = Diffusion(problem.unbound, fine).given(labels, None).in_turn(images)
        slopes = _epd.Slopes(process, there.model_for(images).denoiser)
        states = flow_states(fine, slopes.denoiser, there.start(there.draw(images, seed=1).start))
        scale = process.signal(times).entry(0, 0)
        flow = [u / alpha.to(u) for u, alpha in zip(states, scale, strict=True)]
        learned = _epd.fitted(slopes, flow, grid, free=free)
        error = median(relative_errors(_epd.sample(slopes, flow[0], learned, free=free), flow[-1]))
        found.append((float(error), grid, learned))
    _, grid, learned = min(found)
    slopes = _epd.Slopes(process, problem.model.denoiser)
    scale = process.signal(_epd.times(process, grid[:1])).entry(0, 0).to(problem.start)
    ended = _epd.sample(slopes, problem.start / scale, learned, free=free)
    return problem.errors(ended), steps * (1 + _epd.STAGES) - free


def methods(problem: Problem, images: int) -> dict[str, Callable[[int], tuple[Tensor, float] | None]]:
    """Everything that is measured, by name: from a number of rounds to errors and evaluations."""
    found: dict[str, Callable[[int], tuple[Tensor, float] | None]] = {
        name: partial(_at_once, problem, method, name) for name, method in AT_ONCE.items()
    }
    found |= {name: partial(learned, problem, images, name) for name in LEARNED}
    found["EPD's form"] = partial(epd, problem, images)
    found |= {name: partial(sequential, problem, name) for name in SEQUENTIAL}
    return found | {name: partial(scheduled, problem, peer) for name, peer in theirs().items()}


def _at_once(problem: Problem, method: Parallel, name: str, rounds: int) -> tuple[Tensor, float]:
    return at_once(problem, method, rounds, _allowed(name, rounds))


def _allowed(name: str, rounds: int) -> int | None:
    return ALLOWED * rounds if name.endswith("a round") else None


@torch.no_grad()
def measure(method: Callable[[int], tuple[Tensor, float] | None], rounds: int) -> dict[str, Any]:
    """One cell: median and root mean square of the errors, and evaluations an image."""
    began = time.perf_counter()
    found = method(rounds)
    if found is None:
        return {}
    errors = found[0].nan_to_num(1e3)
    return {
        "median": float(f"{float(median(errors)):.4g}"),
        "rms": float(f"{float(errors.square().mean().sqrt()):.4g}"),
        "nfe": round(found[1], 1),
        "seconds": round(time.perf_counter() - began, 1),
    }


# -- reports --------------------------------------------------------------------------------------------------------


def report(name: str, case: dict[str, Any]) -> str:
    """The tables of a case."""
    rows = case["rows"]
    rounds = sorted({int(r) for row in rows.values() for r in row})
    lines = [[label, *(_cell(row.get(str(r))) for r in rounds)] for label, row in rows.items() if any(row.values())]
    spent = [
        [label, *((row.get(str(r)) or {}).get("nfe") for r in rounds)]
        for label, row in rows.items() if _together(label) and any(row.values())
    ]  # fmt: skip
    heads = [f"R = {r}" for r in rounds]
    return "\n\n".join([
        f"## {name}",
        f"{case['starts']} starts; relative error to the converged image, median / root mean square.",
        table(["method", *heads], lines),
        "Evaluations an image (sequential solvers: R):",
        table(["method", *heads], spent),
        _against(rows, rounds),
    ])  # fmt: skip


def _together(label: str) -> bool:
    """Whether several states are asked about in a round."""
    return label in (*AT_ONCE, *LEARNED, "EPD's form")


def _cell(cell: Mapping[str, float] | None) -> str:
    return f"{number(cell['median'])} / {number(cell['rms'])}" if cell else "-"


def _against(rows: Mapping[str, Any], rounds: Sequence[int]) -> str:
    """Ours over the best sequential solver, in words."""
    said = []
    for r in map(str, rounds):
        others = [row[r] for label, row in rows.items() if not _together(label) and row.get(r)]
        for label in ("ours", "ours, 12 a round", *LEARNED):
            mine = rows.get(label, {}).get(r)
            if mine and others:
                median, rms = (mine[k] / min(o[k] for o in others) for k in ("median", "rms"))
                goal = f" (sought: {1 / TARGETS[int(r)]:.2f} / 0.50)" if int(r) in TARGETS else ""
                said.append(f"- R = {r}, {label}: {median:.2f} / {rms:.2f}{goal}")
    return "\n".join(["Error over the least of any sequential solver's, median / root mean square:", "", *said])


def write(name: str, cases: dict[str, Any]) -> None:
    """Tables, JSON and plot."""
    texts = [report(case, cases[case]) for case in CASES if case in cases]
    write_text(name, "# The best image in so many rounds\n\n" + "\n\n".join(texts))
    write_json(name, {"cases": cases})
    plot(name, cases)


def plot(name: str, cases: dict[str, Any]) -> None:
    """Median error against rounds (above) and against evaluations (below), a column a case."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    shown = [case for case in CASES if case in cases]
    names = list(dict.fromkeys(label for case in shown for label in cases[case]["rows"]))
    colours = dict(zip(names, plt.get_cmap("tab20")(range(len(names))), strict=True))
    figure, axes = plt.subplots(2, len(shown), figsize=(3.4 * len(shown), 8.0), squeeze=False)
    lines = {}
    for column, case in enumerate(shown):
        for label, row in cases[case]["rows"].items():
            cells = sorted((int(r), cell) for r, cell in row.items() if cell and cell["median"] < 1)
            ours = label.startswith("ours")
            style = {
                "linestyle": "-" if ours else ":" if _together(label) else "--",
                "marker": "o" if ours else "^" if _together(label) else "s",
                "linewidth": 1.8 if ours else 0.9, "markersize": 3.5, "color": colours[label],
            }  # fmt: skip
            errors = [c["median"] for _, c in cells]
            axes[0][column].semilogy([r for r, _ in cells], errors, **style)
            (lines[label],) = axes[1][column].loglog([c["nfe"] for _, c in cells], errors, **style)
        axes[0][column].set_title(case)
        axes[0][column].set_xlabel("rounds")
        axes[1][column].set_xlabel("evaluations")
        axes[0][column].xaxis.get_major_locator().set_params(integer=True)
        for axis in axes[:, column]:
            axis.grid(visible=True, which="both", alpha=0.2)
            mark_plainly(axis.yaxis)
        mark_plainly(axes[1][column].xaxis)
    for axis in axes[:, 0]:
        axis.set_ylabel("median relative error")
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.legend(lines.values(), lines.keys(), loc="lower center", ncols=min(len(names), 8), fontsize=9)
    with atomic_path(RESULTS / f"{name}.png") as temporary:
        figure.savefig(temporary, dpi=80)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES)
    parser.add_argument("--methods", nargs="+", help="only these, by name")
    parser.add_argument("--rounds", nargs="+", type=int, default=ROUNDS)
    parser.add_argument("--starts", type=int, default=24)
    parser.add_argument("--fine", type=int, default=120, help="calls of the converged images")
    parser.add_argument("--images", type=int, default=64, help="that a plan is learned from")
    parser.add_argument("--data", type=Path, help=".npz with x_train (uint8) for the mixture; synthetic images without")
    parser.add_argument("--redo", action="store_true", help="measure again what the file has")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--name", default="latency", help="of the files in results/")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.cases:
        with torch.no_grad():
            made = problem(name, arguments.starts, arguments.fine, arguments.data)
        for label, method in methods(made, arguments.images).items():
            if arguments.methods and label not in arguments.methods:
                continue
            found = {str(r): measure(method, r) for r in arguments.rounds if arguments.redo
                     or str(r) not in kept(arguments.name, name).get("rows", {}).get(label, {})}  # fmt: skip
            if not found:
                continue
            cases = read_json(arguments.name).get("cases", {})
            case = cases.setdefault(name, {"starts": arguments.starts, "fine": arguments.fine, "rows": {}})
            case["rows"].setdefault(label, {}).update(found)
            write(arguments.name, cases)
            print(name, label, {r: _cell(cell) for r, cell in found.items()}, flush=True)


def kept(name: str, case: str) -> dict[str, Any]:
    """What the file has of a case."""
    found: dict[str, Any] = read_json(name).get("cases", {}).get(case, {})
    return found


if __name__ == "__main__":
    main()
