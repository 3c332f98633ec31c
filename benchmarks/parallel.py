r"""How many rounds of batched network calls bring all steps at once to the step-by-step result.

A round asks the network about every state that is not settled, in one batch. Each start's relative error against the
sequential result of the same plan and the same noise is measured after every round; the tables say after how many it
is below 1e-2, 1e-3 and 1e-4 for good, as median (worst) over the starts, and what that cost in network evaluations
(NFE) an image. A method is stopped when every start has been below 3e-5 twice in a row, or after `--cap` rounds.

    python benchmarks/parallel.py                                 # everything that is not in results/parallel.json yet
    python benchmarks/parallel.py --cases fashion-vp:ddim:100     # one case
    python benchmarks/parallel.py --cases collocation             # the cases whose name contains this
    python benchmarks/parallel.py --list
    python benchmarks/parallel.py --cases emoji --methods triangular --redo

Ours are `preconditioned` (the default) and `plain` (the same without mixing). The peers are restated here on the same
plans: *DEQ* is Anderson's mixing a time step as released (5 past rounds, ridge 1e-3), *Picard* holds the noise
prediction, *ParaTAA* is triangular mixing with 2 or 4 past rounds (with a relative ridge, 1e-6, in place of its
absolute one), *ParaDiGMS* is Picard's iteration on increments in a sliding window that moves on by its own tolerance.
As the last one's error is set by that tolerance, it is run with 0.1 (its default), 0.01 and 0.001, and each start is
counted with the best of them.

The section on collocation counts rounds to the *exact solution of the flow* in place of a plan's own result.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _common import median, number, plot_lines, read_json, relative_errors, table, write_json, write_text
from _mixture import mixture
from torch import Tensor

from pushforward import SOLVERS, Diffusion, Function, Model, Plan, grid, load
from pushforward.denoiser import Ask, Denoiser
from pushforward.execute import PARALLEL_METHODS, Mixing, Noise, Parallel, Round, Solution, parallel, run
from pushforward.linear import VP, Process, ScaledProcess
from pushforward.maps.code import GaussianStream
from pushforward.plan import Register, auto, exponential

THRESHOLDS = (1e-2, 1e-3, 1e-4)
ENOUGH, TWICE = 3e-5, 2  # a run stops when every start was below this, this often in a row
FLOW = "flow"  # what names of the collocation cases end in
LABELS = {
    "preconditioned": "preconditioned (ours)",
    "plain": "plain (ours)",
    "anderson": "DEQ (Anderson)",
    "picard": "Picard",
    "paradigms-10": "ParaDiGMS, window 10",
    "paradigms-all": "ParaDiGMS, no window",
    "triangular-2": "ParaTAA, history 2",
    "triangular": "ParaTAA, history 4",
}
OURS = ("preconditioned", "plain")
TOLERANCES = (0.1, 0.01, 0.001)  # of ParaDiGMS
PANELS = ("fashion-vp:ddim:100", "fashion-vp:ddim:1000", "fashion-langevin:ddim:50", "mixture:ddim:100:float64")


# -- cases ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A plan on a network.

    Args:
        source: a model's name, or `mixture`.
        solver: a name in `SOLVERS`.
        steps: of the plan.
        starts: images it is measured on.
        settings: of the solver.
        spacing: `power` (exponent 2) or `uniform`.
        dtype: of the states.
        methods: what is measured.
    """

    source: str
    solver: str
    steps: int
    starts: int
    settings: dict[str, Any] = field(default_factory=dict)
    spacing: str = "power"
    dtype: str = "float32"
    methods: tuple[str, ...] = tuple(LABELS)

    @property
    def name(self) -> str:
        """What `--cases` finds it by."""
        parts = [self.source, self.solver, str(self.steps), *(f"{k}={v:g}" for k, v in self.settings.items())]
        parts += [self.spacing] * (self.spacing != "power") + [self.dtype] * (self.source == "mixture")
        return ":".join(parts)


SHORT = ("preconditioned", "plain", "anderson", "triangular")
CASES = (
    Case("fashion-vp", "ddim", 25, 16),
    Case("fashion-vp", "ddim", 50, 8),
    Case("fashion-vp", "ddim", 100, 4),
    Case("fashion-vp", "ddim", 100, 4, spacing="uniform"),
    Case("fashion-vp", "ddim", 50, 4, {"eta": 0.5}),
    Case("fashion-vp", "ddim", 50, 4, {"eta": 1.0}),
    Case("fashion-blurring", "ddim", 50, 4),
    Case("fashion-langevin", "ddim", 50, 4),
    Case("fashion-langevin", "gddim", 50, 4, {"order": 1}, methods=SHORT),
    Case("emoji", "ddim", 50, 4),
    Case("mixture", "ddim", 100, 16),
    Case("mixture", "ddim", 100, 16, dtype="float64"),
    Case("fashion-blurring", "ddim", 200, 2, methods=SHORT),
    Case("fashion-langevin", "ddim", 200, 2, methods=SHORT),
    Case("fashion-vp", "ddim", 1000, 2, methods=("preconditioned", "triangular")),
)
FLOWS = {"mixture": 16, "fashion-vp": 8}  # cases of the collocation section, and their starts


@dataclass(frozen=True, eq=False)
class Problem:
    """A plan to run, from starts and noises that are the same every time.

    Args:
        diffusion: the model under its labels, and the plan.
        count: starts.
    """

    diffusion: Diffusion
    count: int

    @property
    def plan(self) -> Plan:
        """The plan."""
        return self.diffusion.plan

    def draw(self) -> tuple[Tensor, Noise]:
        """Terminal states, and noises as executors ask for them."""
        stream = GaussianStream(0, range(self.count), self.diffusion.model.state_shape(1)[1:])
        return self.diffusion.start(stream.draw()), stream.noise

    def sequential(self) -> Tensor:
        """Clean images, step by step."""
        start, noise = self.draw()
        return self.image(run(self.plan, self.diffusion.model.denoiser, start, noise=noise))

    def image(self, state: Tensor) -> Tensor:
        """The image in a last state."""
        return self.diffusion.model.process.image(state)


def model_of(source: str, count: int, data: Path | None) -> Model:
    """A model under `count` labels, or the exact score of a mixture as one."""
    if source != "mixture":
        model = load(source)
        return model.given(torch.arange(count) % len(model.classes)) if model.classes else model
    exact, process = mixture(data), VP()
    shape = tuple(exact.means.shape[1:])
    levels: dict[float, Callable[[int, Tensor], Tensor]] = {}

    def denoise(u: Tensor, t: float) -> Tensor:
        if t not in levels:
            levels[t] = exact.at(process, torch.tensor([t], dtype=torch.float64), u)
        return levels[t](0, u)

    return Model("mixture", process, Function(denoise), shape, exact.reference(), statistics=exact.spectrum())


def problem(case: Case, starts: int, data: Path | None) -> Problem:
    """The case, ready to run."""
    model = model_of(case.source, starts, data)
    spacing = {"power": grid.power, "uniform": grid.uniform}[case.spacing]
    plan = SOLVERS[case.solver](model.process, spacing(model.process, case.steps), **case.settings)
    return Problem(Diffusion(model, plan, dtype=getattr(torch, case.dtype)), starts)


# -- measuring ------------------------------------------------------------------------------------------------------


class Done(Exception):
    """Every start is near enough."""


@dataclass(eq=False)
class Counted:
    """A denoiser that counts the states it is asked about, by image."""

    denoiser: Denoiser
    nfe: Tensor

    def at(self, process: Process, times: Tensor, like: Tensor) -> Ask:
        """See `Denoiser`."""
        ask = self.denoiser.at(process, times, like)

        def counted(k: int | Tensor, u: Tensor, of: Tensor | None = None) -> Tensor:
            images = torch.arange(len(u)) if of is None else of
            self.nfe += torch.bincount(images, minlength=len(self.nfe))
            return ask(k, u, of)

        return counted


@dataclass
class Track:
    """Errors and evaluations of every start, round by round.

    Args:
        errors: `[round][start]`.
        nfe: so far, likewise.
    """

    errors: list[list[float]] = field(default_factory=list)
    nfe: list[list[float]] = field(default_factory=list)

    def add(self, errors: Tensor, nfe: Tensor) -> None:
        """The next round."""
        self.errors.append(errors.nan_to_num(math.inf).tolist())
        self.nfe.append(nfe.tolist())

    def done(self) -> bool:
        """Whether every start has stayed below the least threshold long enough."""
        last = self.errors[-TWICE:]
        return len(last) == TWICE and max(map(max, last)) < ENOUGH

    def reached(self, threshold: float, start: int) -> tuple[int, float] | None:
        """The round from which on the error is below the threshold, and evaluations by then."""
        errors = [row[start] for row in self.errors]
        above = [k for k, e in enumerate(errors) if not e < threshold]
        first = above[-1] + 1 if above else 0
        return None if first == len(errors) else (first + 1, self.nfe[first][start])

    def row(self) -> dict[str, Any]:
        """For JSON: rounds and evaluations of each start to every threshold, and median errors by round."""
        starts = range(len(self.errors[0]))
        found = {t: [self.reached(t, i) for i in starts] for t in THRESHOLDS}
        return {
            "rounds": {f"{t:g}": [x and x[0] for x in values] for t, values in found.items()},
            "nfe": {f"{t:g}": [x and x[1] for x in values] for t, values in found.items()},
            "median": [_short(statistics.median(row)) for row in self.errors],
            "worst": [_short(max(row)) for row in self.errors],
        }


def follow(problem: Problem, method: Parallel, exact: Tensor, cap: int) -> Track:
    """Errors against `exact` after every round of a method."""
    track, start, noise = Track(), *problem.draw()
    model = problem.diffusion.model
    counted = Counted(model.denoiser, torch.zeros(problem.count, dtype=torch.long))
    method = replace(method, tolerance=1e-6, max_rounds=cap, reference=model.gaussian.tempered())

    def tell(step: Round) -> None:
        assert step.last is not None
        track.add(relative_errors(problem.image(step.last()), exact), counted.nfe)
        if track.done():
            raise Done

    try:
        solution = parallel(problem.plan, counted, start, noise=noise, method=method, callback=tell)
    except Done:
        return track
    if solution.diverged.any():  # the steps one by one count as so many rounds more
        for _ in range(solution.rounds - len(track.errors) - 1):
            track.errors.append(track.errors[-1])
            track.nfe.append(track.nfe[-1])
        track.add(relative_errors(problem.image(solution.last), exact), solution.nfe)
    return track


def used(problem: Problem, exact: Tensor, tolerance: float = 1e-3) -> dict[str, Any]:
    """Our default as it is used: it decides itself when to stop."""
    start, noise = problem.draw()
    model = problem.diffusion.model
    method = replace(PARALLEL_METHODS["preconditioned"], tolerance=tolerance, reference=model.gaussian.tempered())
    solution: Solution = parallel(problem.plan, model.denoiser, start, noise=noise, method=method)
    errors = relative_errors(problem.image(solution.last), exact)
    return {
        "tolerance": tolerance,
        "rounds": solution.rounds,
        "nfe": float(solution.nfe.double().mean()),
        "median": _short(float(median(errors))),
        "worst": _short(float(errors.max())),
        "diverged": int(solution.diverged.sum()),
    }


def method_of(name: str) -> Parallel:
    """Ours or a peer's."""
    if name == "triangular-2":
        return replace(PARALLEL_METHODS["triangular"], mixing=Mixing("triangular", history=2, shrink=None))
    return PARALLEL_METHODS[name]


def measure(problem: Problem, name: str, exact: Tensor, cap: int) -> dict[str, Any] | None:
    """One method on one case; `None` where it is not defined."""
    began = time.perf_counter()
    if name.startswith("paradigms"):
        process = problem.plan.process
        if not isinstance(process, ScaledProcess) or process.basis.shape:
            return None
        window = 10 if name.endswith("10") else problem.plan.nfe
        row = best_of([sliding(problem, exact, window, tolerance, cap) for tolerance in TOLERANCES])
    else:
        row = follow(problem, method_of(name), exact, cap).row()
        if name == "preconditioned":
            row["used"] = used(problem, exact)
    return {"starts": problem.count, "cap": cap, "seconds": round(time.perf_counter() - began, 1), **row}


# -- ParaDiGMS ------------------------------------------------------------------------------------------------------


def sliding(problem: Problem, exact: Tensor, window: int, tolerance: float, cap: int) -> Track:
    r"""Picard's iteration on increments in a window, each start for itself.

    With `Phi` the plan's step, all states of the window from step b on become `u_b + sum_{b <= i < j} (Phi(u_i) - u_i)`
    (noise included); b moves to the first whose mean square change is above `tolerance^2` times the variance of
    `u_j` given the state before it and the image; new states begin as copies of the last.

    References:
        Parallel Sampling of Diffusion Models, Shih et al., arXiv 2305.16317, algorithm 1.
    """
    plan, (start, noise) = problem.plan, problem.draw()
    rows = [_row(plan, n) for n in range(1, len(plan.nodes))]
    noises = {k: noise(k).to(start) for k in plan.noises}
    scales = _posterior_variance(plan)
    times = torch.tensor([node.time for node in plan.nodes[:-1]], dtype=torch.float64)
    ask = problem.diffusion.model.denoiser.at(plan.process, times, start)
    ends = []
    for i in range(problem.count):
        on_state, on_answer, added = _coefficients(rows, noises, start, i)
        states = start[i].expand(len(plan.nodes), *start.shape[1:]).clone()
        begin, rounds, nfe = 0, 0, 0
        while begin < len(rows) and rounds < min(cap, len(rows)):
            stop = min(begin + window, len(rows))
            at = torch.arange(begin, stop)
            answers = ask(at, states[at], torch.full((len(at),), i))
            moved = on_state[at] * states[at] + on_answer[at] * answers + added[at] - states[at]
            new = states[begin] + moved.cumsum(0)
            change = (new - states[at + 1]).flatten(1).square().mean(1)
            states[at + 1] = new
            states[stop + 1 :] = new[-1]
            late = (change > tolerance**2 * scales[at]).nonzero()[:, 0]
            rounds, nfe = rounds + 1, nfe + len(at)
            begin += 1 + int(late[0]) if len(late) else len(at)
        complete = begin >= len(rows)
        error = float(relative_errors(problem.image(states[-1:]), exact[i : i + 1])) if complete else math.inf
        ends.append((rounds, nfe, error))
    return _as_track(ends)


def _row(plan: Plan, n: int) -> tuple[float, float, float]:
    """What node n takes of the state, the answer and the noise."""
    wanted = (Register("state", n - 1), Register("answer", n - 1), Register("noise", n))
    terms = plan.nodes[n].terms
    assert set(terms) <= set(wanted), "ParaDiGMS takes plans of one step"
    a, b, c = (float(terms[r].coefficients) if r in terms else 0.0 for r in wanted)
    return a, b, c


def _coefficients(
    rows: Sequence[tuple[float, float, float]], noises: dict[int, Tensor], like: Tensor, i: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the states and answers, `(steps, 1, ...)`, and the noise that each step of start i adds."""
    ones = (1,) * (like.ndim - 1)
    a, b = (torch.tensor([row[k] for row in rows], dtype=torch.float64).to(like).view(-1, *ones) for k in (0, 1))
    nothing = torch.zeros_like(like[i])
    added = [row[2] * noises[n + 1][i] if n + 1 in noises else nothing for n, row in enumerate(rows)]
    return a, b, torch.stack(added)


def _posterior_variance(plan: Plan) -> Tensor:
    """Of the state after each step, given the one before it and the image."""
    times = torch.tensor([node.time for node in plan.nodes], dtype=torch.float64)
    variance = plan.process.covariance(times).coefficients[..., 0, 0]
    ahead = plan.process.transition(times[:-1], times[1:]).coefficients[..., 0, 0]
    fresh = variance[:-1] - ahead.square() * variance[1:]
    return (variance[1:] * fresh / variance[:-1]).clamp_min(1e-20)


def _as_track(ends: Sequence[tuple[int, int, float]]) -> Track:
    """Only the end counts: until then, a start has no result."""
    track = Track()
    for r in range(1, max(rounds for rounds, _, _ in ends) + 1):
        track.errors.append([e if r >= rounds else math.inf for rounds, _, e in ends])
        track.nfe.append([float(nfe) for _, nfe, _ in ends])
    return track


def best_of(tracks: Sequence[Track]) -> dict[str, Any]:
    """Each start with the track that reaches the threshold in fewest rounds."""
    rows = [track.row() for track in tracks]
    best: dict[str, Any] = {"rounds": {}, "nfe": {}}
    for key in rows[0]["rounds"]:
        pairs = [
            min(((r, n) for r, n in choice if r is not None), default=(None, None))
            for choice in zip(*(zip(row["rounds"][key], row["nfe"][key], strict=True) for row in rows), strict=True)
        ]
        best["rounds"][key], best["nfe"][key] = [r for r, _ in pairs], [n for _, n in pairs]
    return best


# -- collocation ----------------------------------------------------------------------------------------------------


def flow_rows(
    source: str, starts: int, steps: int, cap: int, data: Path | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rounds to the exact flow: collocation and explicit plans with all steps at once, and `auto` step by step."""
    model = model_of(source, starts, data)
    process, white = model.process, model.reference
    dtype = torch.float64 if source == "mixture" else torch.float32

    def with_plan(plan: Plan) -> Problem:
        return Problem(Diffusion(model, plan, dtype=dtype), starts)

    clean = torch.zeros(1, dtype=torch.float64)

    def fine(many: int) -> Tensor:
        spaced = torch.cat([grid.angle(process, many, exponent=0.7, end=process.t_min), clean])
        return with_plan(exponential(process, spaced, order=2, reference=white, variable="angle")).sequential()

    exact = fine(400)
    agreement = float(relative_errors(fine(200), exact).max())
    common = {"starts": starts, "cap": cap, "agreement": _short(agreement)}
    plans = {
        f"collocation, {steps} nodes": SOLVERS["collocation"](process, grid.power(process, steps), reference=white),
        **{f"auto, {n} steps at once": auto(process, n, white) for n in (20, 50)},
    }
    for label, plan in plans.items():
        began = time.perf_counter()
        row = follow(with_plan(plan), PARALLEL_METHODS["preconditioned"], exact, cap).row()
        yield label, {**common, "calls": plan.nfe, "seconds": round(time.perf_counter() - began, 1), **row}
    began, track = time.perf_counter(), Track()
    budgets = (5, 8, 10, 12, 15, 20, 25, 30, 40, 50, 70, 100)
    for n in budgets:
        errors = relative_errors(with_plan(auto(process, n, white)).sequential(), exact)
        track.add(errors, torch.full((starts,), float(n)))
    row = track.row()
    row["rounds"] = row["nfe"]  # a call is a round
    seconds = round(time.perf_counter() - began, 1)
    yield "auto, step by step", {**common, "calls": None, "budgets": list(budgets), "seconds": seconds, **row}


# -- reporting ------------------------------------------------------------------------------------------------------


def _short(value: float) -> float | None:
    return float(f"{value:.3g}") if math.isfinite(value) else None


def _cell(values: Sequence[float | None], cap: int | None) -> str:
    """`median (worst)`; starts that never came there count as worst."""

    def text(value: float) -> str:
        return f"{value:g}" if math.isfinite(value) else "-" if cap is None else f"> {cap}"

    median, worst = _median(values), max(math.inf if v is None else v for v in values)
    return f"{text(median)} ({text(worst)})" if math.isfinite(median) else text(median)


def _median(values: Sequence[float | None]) -> float:
    return statistics.median([math.inf if v is None else v for v in values])


def report(name: str, rows: dict[str, Any]) -> str:
    """A case's table, and our rounds over the best peer's."""
    order = [m for m in LABELS if rows.get(m)]
    first = rows[order[0]]
    lines = [
        [LABELS[m], *(_cell(rows[m]["rounds"][f"{t:g}"], rows[m]["cap"]) for t in THRESHOLDS),
         _cell(rows[m]["nfe"]["0.001"], None)]
        for m in order
    ]  # fmt: skip
    text = [
        f"## {name}",
        f"{first['starts']} starts; rounds until the relative error stays below the threshold, median (worst).",
        table(["method", *(f"{t:g}" for t in THRESHOLDS), "NFE to 0.001"], lines),
    ]
    peers = [m for m in order if m not in OURS]
    if "preconditioned" in order and peers:
        said = []
        for t in THRESHOLDS:
            mine = _median(rows["preconditioned"]["rounds"][f"{t:g}"])
            theirs, who = min((_median(rows[m]["rounds"][f"{t:g}"]), LABELS[m]) for m in peers)
            if math.isfinite(mine) and math.isfinite(theirs):
                said.append(f"{mine / theirs:.2f} at {t:g} ({mine:g} against {theirs:g}, {who})")
        text.append(f"Median rounds of `preconditioned` over the best peer's: {', '.join(said) or '-'}.")
    if "used" in first:
        own = first["used"]
        text.append(
            f"`preconditioned` left to itself at tolerance {own['tolerance']:g}: {own['rounds']} rounds, "
            f"{own['nfe']:.0f} evaluations an image, error {number(own['median'])} (worst {number(own['worst'])})"
            + (f", {own['diverged']} run step by step" if own["diverged"] else "") + "."
        )  # fmt: skip
    return "\n\n".join(text)


def report_flow(name: str, rows: dict[str, Any]) -> str:
    """The table of a collocation case."""
    first = next(iter(rows.values()))
    wanted = [f"{t:g}" for t in THRESHOLDS[:2]]
    lines = [
        [label, *(_cell(row["rounds"][t], None) for t in wanted), *(_cell(row["nfe"][t], None) for t in wanted),
         min((e for e in row["median"] if e is not None), default=None)]
        for label, row in rows.items()
    ]  # fmt: skip
    return "\n\n".join([
        f"## {name}",
        f"{first['starts']} starts, against the exact flow (400 steps; 200 differ from it by {first['agreement']:.1e} "
        "at worst), median (worst).",
        table(["plan", *(f"rounds to {t}" for t in wanted), *(f"NFE to {t}" for t in wanted), "least error"], lines),
    ])  # fmt: skip


def write(name: str, cases: dict[str, Any]) -> None:
    """Tables, JSON and plot."""
    flows = [case for case in cases if case.endswith(FLOW)]
    plain = [case.name for case in CASES if case.name in cases] + flows
    texts = [(report_flow if c in flows else report)(c, cases[c]) for c in plain if any(cases[c].values())]
    write_text(name, "# Rounds to the step-by-step result\n\n" + "\n\n".join(texts))
    write_json(name, {"cases": cases})
    shown = [c for c in PANELS if c in cases] or [c for c in plain if c not in flows][:4]
    panels = {c: _panel(cases[c]) for c in shown}
    if panels:
        plot_lines(name, panels, "rounds", "median relative error to step by step")


def _panel(rows: dict[str, Any]) -> dict[str, tuple[list[float], list[float], bool]]:
    lines = {}
    for method in LABELS:
        curve = (rows.get(method) or {}).get("median")
        if curve:
            points = [(k + 1.0, max(e, 1e-8)) for k, e in enumerate(curve) if e is not None]
            lines[LABELS[method]] = ([r for r, _ in points], [e for _, e in points], method in OURS)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=[""], help="names, or parts of names; see --list")
    parser.add_argument("--methods", nargs="+", choices=tuple(LABELS), help="only these")
    parser.add_argument("--steps", type=int, help="replaces the steps of the cases chosen (to try things out)")
    parser.add_argument("--starts", type=int, help="replaces the number of starts")
    parser.add_argument("--nodes", type=int, default=24, help="of collocation")
    parser.add_argument("--cap", type=int, default=40, help="most rounds")
    parser.add_argument("--data", type=Path, help=".npz with x_train (uint8) for the mixture; synthetic images without")
    parser.add_argument("--redo", action="store_true", help="measure again what the file has")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--name", default="parallel", help="of the files in results/")
    parser.add_argument("--list", action="store_true", help="names of all cases, and stop")
    arguments = parser.parse_args()
    flows = {f"{source}:{FLOW}": source for source in FLOWS}
    if arguments.list:
        print("\n".join([case.name for case in CASES] + [f"{name} (collocation)" for name in flows]))
        return
    torch.set_num_threads(arguments.threads)
    cases: dict[str, Any] = read_json(arguments.name).get("cases", {})
    exactly = {case.name for case in CASES} & set(arguments.cases)

    def chosen(name: str, also: str = "") -> bool:
        return name in exactly or any(part in name + also for part in arguments.cases if part not in exactly)

    for case in (c for c in CASES if chosen(c.name)):
        if arguments.steps:
            case = replace(case, steps=arguments.steps)
        rows = cases.setdefault(case.name, {})
        methods = [m for m in arguments.methods or case.methods if arguments.redo or m not in rows]
        run_case(partial(problem, case, arguments.starts or case.starts, arguments.data), methods, rows, case.name,
                 arguments.cap, lambda: write(arguments.name, cases))  # fmt: skip
    for name, source in flows.items():
        if chosen(name, " collocation") and (arguments.redo or name not in cases):
            found = flow_rows(source, arguments.starts or FLOWS[source], arguments.nodes, arguments.cap, arguments.data)
            cases[name] = dict(found)
            write(arguments.name, cases)
            print(report_flow(name, cases[name]) + "\n", flush=True)


@torch.no_grad()
def run_case(
    make: Callable[[], Problem],
    methods: Sequence[str],
    rows: dict[str, Any],
    name: str,
    cap: int,
    save: Callable[[], None],
) -> None:
    """Measure methods one after another, each kept as soon as it is there."""
    if not methods:
        return
    made = make()
    exact = made.sequential()
    for method in methods:
        rows[method] = measure(made, method, exact, cap)
        if rows[method]:
            print(f"{name}, {method}: {rows[method]['seconds']:.0f} s, rounds to 1e-3: "
                  f"{_cell(rows[method]['rounds']['0.001'], cap)}", flush=True)  # fmt: skip
        save()
    print("\n" + report(name, rows) + "\n", flush=True)


if __name__ == "__main__":
    main()
