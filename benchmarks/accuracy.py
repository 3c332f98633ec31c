r"""How near each solver comes to the exact solution of the probability flow, by number of network evaluations (NFE).

Every solver starts from the same states at the noisiest time and ends at clean data; what it costs is counted to the
last network call, a final denoise included. The reference is the flow followed to the least noise the network was
trained for, in hundreds of steps, and from there to clean data in one step that extrapolates the last answers; two
unlike solvers must agree on it. It is kept in `build/accuracy`. The error of one start is the root-mean-square
difference of the images over the root-mean-square of the reference; the tables give the median and the worst over the
starts.

    python benchmarks/accuracy.py                                   # a synthetic mixture, and the models of the package
    python benchmarks/accuracy.py --model fashion-vp --cases none   # one model: ten minutes on one core
    python benchmarks/accuracy.py --data mnist.npz --cases mixture  # the mixture around real images
    python benchmarks/accuracy.py --model runs/my-model --cases none
    python benchmarks/accuracy.py --model emoji-2 --guidance 2 --cases none     # as users draw it: with captions

The peers are the schedulers of `diffusers` on the same network. Each is given every choice of its own options
(spacing, Karras, exponential, beta and Lu noise levels, order, last step; with --full also prediction and variant), and
is shown with the choice that is best *at that NFE*, in hindsight. Ours, `auto`, is one rule. On a trained network,
where every call takes long, each scheduler and each solver of ours has a few choices that win elsewhere; with --full
it has them all.

Cases that the file in `results/` has and this run has not stay in it.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from _common import median, plot_lines, read_json, relative_errors, table, write_json, write_text
from _mixture import Mixture, mixture
from _peers import Handed, Peer, peers, run_peer
from torch import Tensor

from pushforward.data.files import atomic_path, digest
from pushforward.denoiser import Denoiser
from pushforward.errors import PushforwardError
from pushforward.execute import adaptive, run
from pushforward.linear import POINT, Blurring, Discrete, Gaussian, Langevin, Process, ScaledProcess, root
from pushforward.maps.labels import in_turn, is_guided
from pushforward.model import load
from pushforward.model.zoo import names
from pushforward.plan import Plan, auto, ddim, dpm_solver_pp, exponential, gddim, grid, runge_kutta, unipc

ADAPTIVE = "RK45 (adaptive)"
BUDGETS = (5, 8, 10, 15, 20, 30, 50)
STEPS = {"mixture": 1000, "network": 300}  # of the reference
KEPT = Path(__file__).parents[1] / "build" / "accuracy"
Make = Callable[[Process, Tensor], Plan]


@dataclass(frozen=True, eq=False)
class Case:
    """One network with the starts it is solved from.

    Args:
        name: of the case.
        process: its diffusion.
        denoiser: the network.
        start: states at `t_max`.
        white: N(m, s^2 I), the reference Gaussian that goes with the model.
        spectrum: N(m, C) with one variance a DCT frequency, where known.
        guided: whether by a weight above 1.
    """

    name: str
    process: Process
    denoiser: Denoiser
    start: Tensor
    white: Gaussian
    spectrum: Gaussian | None = None
    guided: bool = False

    @property
    def has_peers(self) -> bool:
        """Whether the schedulers know its process: variance preserving, the same for every pixel."""
        if not isinstance(self.process, ScaledProcess) or self.process.basis.shape:
            return False
        alpha, sigma = self.process.alpha_sigma(torch.tensor([0.5 * self.process.t_max], dtype=torch.float64))
        return bool((alpha.square() + sigma.square() - 1).abs() < 1e-6)


@dataclass(frozen=True)
class Ours:
    """One of our solvers with its settings.

    Args:
        family: what the table calls it.
        settings: in words.
        plan: `(process, steps) -> Plan`.
        calls: network calls of `n` steps.
    """

    family: str
    settings: str
    plan: Callable[[Process, int], Plan]
    calls: Callable[[int], int] = lambda n: n

    def within(self, process: Process, nfe: int) -> Plan:
        """The plan with the most steps for `nfe` network calls.

        Raises:
            PushforwardError: there is none.
        """
        steps = max((n for n in range(1, nfe + 1) if self.calls(n) <= nfe), default=0)
        if not steps:
            msg = f"{self.family} needs more than {nfe} network calls."
            raise PushforwardError(msg)
        plan = self.plan(process, steps)
        if plan.nfe > nfe:
            msg = f"{self.family} ({self.settings}) took {plan.nfe} network calls where {nfe} were allowed."
            raise AssertionError(msg)
        return plan


def solvers(case: Case) -> Iterator[Ours]:
    """Every solver of ours with sensible settings."""
    scale = math.sqrt(float(case.white.variance))
    grids: dict[str, Callable[[Process, int], Tensor]] = {
        "uniform": grid.uniform,
        "quadratic": grid.power,
        "log-snr": grid.log_snr,
        "karras": grid.karras,
        "angle": partial(grid.angle, scale=scale),
        "wide": partial(grid.angle, scale=1.0, exponent=0.6),
    }

    def on(name: str, make: Make) -> Callable[[Process, int], Plan]:
        return lambda process, steps: make(process, grids[name](process, steps))

    yield Ours("auto", "", lambda process, steps: auto(process, steps, case.white, guided=case.guided))
    for name in grids:
        yield Ours("DDIM", name, on(name, ddim))
        for order in (2, 3):
            yield Ours(f"DPM-Solver++ {order}M", name, on(name, partial(dpm_solver_pp, order=order)))
            yield Ours(f"UniPC {order}", name, on(name, partial(unipc, order=order)))
            yield Ours(f"gDDIM {order}", name, on(name, partial(gddim, order=order)))
    for name in ("uniform", "quadratic"):
        corrected = partial(gddim, order=2, corrector="evaluate")
        yield Ours("gDDIM 2 evaluate", name, on(name, corrected), calls=lambda n: 2 * n - 1)
    for tableau, stages in (("heun", 2), ("midpoint", 2), ("rk4", 4)):
        for name in ("log-snr", "karras", "angle"):
            # The step to clean data is exact for point data and takes one call.
            calls = partial(lambda n, stages: stages * (n - 1) + 1, stages=stages)
            yield Ours(tableau, name, on(name, partial(runge_kutta, tableau=tableau)), calls)
    references = {"C = 0": (POINT, "log-snr"), "C = s^2": (case.white, "angle")}
    if case.spectrum is not None:
        references["C = spectrum"] = (case.spectrum, "angle")
    for words, (reference, variable) in references.items():
        solver = partial(exponential, reference=reference, variable=variable)
        for order, corrector, name in product((1, 2, 3), (None, "reuse"), ("log-snr", "angle", "wide")):
            chosen = partial(solver, order=order, corrector=corrector)
            yield Ours(f"exponential {words}", f"order {order}, corrector {corrector}, {name}", on(name, chosen))
        chosen = partial(solver, order=2, corrector="evaluate")
        settings = "order 2, corrector evaluate, angle"
        yield Ours(f"exponential {words}", settings, on("angle", chosen), calls=lambda n: 2 * n - 1)


FEW = {
    "auto", "DDIM: quadratic", "DPM-Solver++ 2M: angle", "UniPC 2: angle", "gDDIM 2: quadratic",
    "exponential C = 0: order 1, corrector reuse, angle", "exponential C = 0: order 2, corrector reuse, angle",
    "exponential C = s^2: order 1, corrector reuse, angle", "exponential C = s^2: order 2, corrector reuse, angle",
    "exponential C = s^2: order 1, corrector reuse, wide", "exponential C = s^2: order 2, corrector reuse, wide",
    "exponential C = s^2: order 3, corrector reuse, wide",
}  # fmt: skip
FEW_PEERS = {
    "DDIM: epsilon trailing False",
    *(f"DEIS {order}: {order} epsilon {grid}" for order in (2, 3)
      for grid in ("trailing", "karras_sigmas", "exponential_sigmas")),
    *(f"DPM-Solver++ 2M: 2 epsilon {grid} zero" for grid in ("karras_sigmas", "exponential_sigmas", "lu_lambdas")),
    *(f"UniPC 2: 2 epsilon {grid} zero bh2" for grid in ("trailing", "karras_sigmas", "exponential_sigmas")),
}  # fmt: skip


# -- the reference --------------------------------------------------------------------------------------------------


def kept(case: Case, steps: int) -> tuple[Tensor, float]:
    """`converged`, from a file where one was made before of the same network and starts."""
    middle = torch.tensor([0.5 * case.process.t_max], dtype=torch.float64)
    with torch.no_grad():
        answer = case.denoiser.at(case.process, middle, case.start)(0, case.start)
    path = KEPT / f"{case.process.name}-{steps}-{digest(case.start, answer)[:12]}.pt"
    if path.is_file():
        exact, agreement = torch.load(path)
        return exact, agreement
    exact, agreement = converged(case, steps)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        torch.save((exact, agreement), temporary)
    return exact, agreement


def converged(case: Case, steps: int) -> tuple[Tensor, float]:
    """The exact solution, and how far two solvers are apart on it (worst start).

    One interpolates the noise prediction in time, the other the velocity in the whitening angle, on unlike grids.
    """
    process = case.process
    clean = torch.zeros(1, dtype=torch.float64)

    def to_least_noise(make: Callable[..., Tensor], **settings: float) -> Tensor:
        return torch.cat([make(process, steps, end=process.t_min, **settings), clean])

    noise = gddim(process, to_least_noise(grid.log_snr), order=2)
    spaced = to_least_noise(grid.angle, exponent=0.7)
    velocity = exponential(process, spaced, order=2, reference=case.white, variable="angle")
    with torch.no_grad():
        a, b = (run(plan, case.denoiser, case.start) for plan in (noise, velocity))
    return b, float(relative_errors(process.image(a), process.image(b)).max())


# -- measuring ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """What one solver with one choice of settings reached; errors `{nfe: (median, worst)}` over the starts."""

    solver: str
    settings: str
    ours: bool
    errors: dict[int, tuple[float, float]]

    @property
    def label(self) -> str:
        """What tables call it."""
        return self.solver if self.ours else f"diffusers {self.solver}"

    def __str__(self) -> str:
        named = f"{self.label}: {self.settings}" if self.settings else self.label
        return f"  {named}: " + ", ".join(f"{n}: {e[0]:.1e}" for n, e in self.errors.items())


def measure(case: Case, exact: Tensor, budgets: Sequence[int], *, every: bool, only: Sequence[str]) -> Iterator[Row]:
    """Every solver of ours and every peer at every budget."""
    full = every or isinstance(case.denoiser, Mixture)
    for ours in solvers(case):
        name = f"{ours.family}: {ours.settings}" if ours.settings else ours.family
        if (only and not {ours.family, name} & set(only)) or not (full or only or name in FEW):
            continue
        yield Row(
            ours.family, ours.settings, True, _errors(case.process, partial(_run_ours, ours, case), exact, budgets)
        )
    if ADAPTIVE in only or (full and not only):
        yield Row(ADAPTIVE, "by tolerance", True, dict(_adaptive_errors(case, exact)))
    if case.has_peers:
        handed = Handed(case.process, case.denoiser, case.start)
        for peer in peers():
            if (not only or peer.scheduler in only) and (every or _chosen(peer, full=full)):
                result = partial(run_peer, peer, handed, case.start)
                yield Row(peer.scheduler, peer.label, False, _errors(case.process, result, exact, budgets))


def _run_ours(ours: Ours, case: Case, nfe: int) -> Tensor | None:
    try:
        return run(ours.within(case.process, nfe), case.denoiser, case.start)
    except PushforwardError:  # too few calls, or a grid or solver that this process does not allow
        return None


def _errors(
    process: Process, result: Callable[[int], Tensor | None], exact: Tensor, budgets: Sequence[int]
) -> dict[int, tuple[float, float]]:
    errors = {}
    for nfe in budgets:
        with torch.no_grad():
            state = result(nfe)
        if state is not None and bool(state.isfinite().all()):
            errors[nfe] = _summary(process, state, exact)
    return errors


def _adaptive_errors(case: Case, exact: Tensor) -> Iterator[tuple[int, tuple[float, float]]]:
    """RK45 to the least noise and a denoise, by the calls it chose to make."""
    last = torch.tensor([case.process.t_min], dtype=torch.float64)
    for tolerance in (1e-1, 1e-2, 1e-3, 1e-4):
        state, calls = adaptive(case.process, case.denoiser, case.start, rtol=tolerance, atol=tolerance)
        with torch.no_grad():
            yield calls + 1, _summary(case.process, case.denoiser.at(case.process, last, state)(0, state), exact)


def _chosen(peer: Peer, *, full: bool) -> bool:
    """One prediction type and the usual variant: the others differ from it by a few percent on the mixture."""
    if not full:
        return f"{peer.scheduler}: {peer.label}" in FEW_PEERS
    return peer.options["prediction_type"] == "epsilon" and peer.options.get("solver_type", "bh2") == "bh2"


def _summary(process: Process, state: Tensor, exact: Tensor) -> tuple[float, float]:
    errors = relative_errors(process.image(state), process.image(exact))
    return float(f"{median(errors):.3g}"), float(f"{errors.max():.3g}")


def best(rows: Sequence[Row], nfe: int, index: int = 0) -> Row | None:
    """The row with the least error at this budget: the median (0) or the worst (1)."""
    able = [row for row in rows if nfe in row.errors]
    return min(able, key=lambda row: row.errors[nfe][index], default=None)


# -- reporting ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """All that was measured of a case."""

    process: str
    starts: int
    agreement: float
    rows: list[Row]

    def families(self) -> dict[str, list[Row]]:
        """The rows of each solver."""
        grouped: dict[str, list[Row]] = {}
        for row in self.rows:
            grouped.setdefault(row.label, []).append(row)
        return grouped

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {**vars(self), "rows": [vars(row) for row in self.rows]}

    @staticmethod
    def from_plain(values: dict[str, Any]) -> Outcome:
        """The reverse of `plain`."""
        rows = [Row(**{**r, "errors": {int(n): tuple(e) for n, e in r["errors"].items()}}) for r in values["rows"]]
        return Outcome(**{**values, "rows": rows})


def report(name: str, outcome: Outcome, budgets: Sequence[int]) -> str:
    """The tables of a case."""
    medians, worst = (_comparison(outcome, budgets, index) for index in (0, 1))
    text = [
        f"## {name}",
        f"{outcome.starts} starts, process `{outcome.process}`. Median relative error by network evaluations. Every "
        "solver but `auto` is shown with the settings that are best at that budget, in hindsight. The two reference "
        f"solvers agree to {outcome.agreement:.1e} (worst start): an error below that says no more.",
        table(["solver", *map(str, budgets)], medians),
        "The worst start, likewise:",
        table(["solver", *map(str, budgets)], worst),
    ]
    by_tolerance = [row for row in outcome.rows if row.label == ADAPTIVE]
    theirs, ours = _rivals(outcome, budgets, 0)
    for row in by_tolerance:
        found = [f"{e[0]:.1e} with {n} evaluations" for n, e in row.errors.items()]
        text.append(f"{ADAPTIVE}: {', '.join(found)}.")
    for title, rivals in (("Best peers", theirs), ("Best of our other settings", ours)):
        found = [f"- {n}: {top.solver}, {top.settings}" for top, n in zip(rivals, budgets, strict=True) if top]
        if found:
            text.append(f"{title}:\n\n" + "\n".join(found))
    return "\n\n".join(text)


def _rivals(outcome: Outcome, budgets: Sequence[int], index: int) -> tuple[list[Row | None], list[Row | None]]:
    """At each budget the best peer, and the best of our settings beside `auto`, by the median (0) or the worst (1)."""
    peers_rows = [row for row in outcome.rows if not row.ours]
    others = [row for row in outcome.rows if row.ours and row.solver not in ("auto", ADAPTIVE)]
    theirs, ours = ([best(rows, nfe, index) for nfe in budgets] for rows in (peers_rows, others))
    return theirs, ours


def _comparison(outcome: Outcome, budgets: Sequence[int], index: int) -> list[list[object]]:
    """The lines of a table: every solver at its best, then how `auto` compares."""
    families = outcome.families()
    families.pop(ADAPTIVE, None)
    lines: list[list[object]] = []
    for label, members in families.items():
        tops = [best(members, nfe, index) for nfe in budgets]
        lines.append([label, *(top and top.errors[n][index] for top, n in zip(tops, budgets, strict=True))])
    rule = families["auto"][0].errors
    titles = ("**auto / best peer**", "**auto / best of our other settings**")
    for title, rivals in zip(titles, _rivals(outcome, budgets, index), strict=True):
        pairs = zip(rivals, budgets, strict=True)
        ratios = [rival and n in rule and rule[n][index] / rival.errors[n][index] for rival, n in pairs]
        if any(ratios):
            lines.append([title, *(ratio or None for ratio in ratios)])
    return lines


def one_setting(outcomes: dict[str, Outcome], budgets: Sequence[int]) -> str:
    """For each process, whether one other setting of ours would do better than `auto` in all of its cases."""
    lines, named = [], []
    for process in ("vp", "blurring", "langevin"):
        some = [o for o in outcomes.values() if o.process.replace("discrete", "vp") == process]
        ratios: dict[str, list[dict[int, float]]] = {}
        for rows in (o.rows for o in some):
            (rule,) = (row.errors for row in rows if row.solver == "auto")
            for row in rows:
                if row.ours and row.solver not in ("auto", ADAPTIVE):
                    common = {n: e[0] / rule[n][0] for n, e in row.errors.items() if n in rule}
                    ratios.setdefault(f"{row.solver}, {row.settings}", []).append(common)
        everywhere = {name: each for name, each in ratios.items() if len(each) == len(some)}
        worst = [{name: max(r[n] for r in each) for name, each in everywhere.items() if all(n in r for r in each)}
                 for n in budgets]  # fmt: skip
        tops = [min(found.items(), key=lambda item: item[1], default=None) for found in worst]
        lines.append([process, len(some), *(top and top[1] for top in tops)])
        named += [f"- {process}, {n}: {top[0]}" for top, n in zip(tops, budgets, strict=True) if top and top[1] < 1]
    return "\n\n".join([
        "## One other setting for each process",
        "Median error over that of `auto`, in the case where it is largest, of the setting that was measured in all "
        "cases of a process and does best so, in hindsight. Below 1, it is better than `auto` everywhere.",
        table(["process", "cases", *map(str, budgets)], lines),
        *["\n".join(named)] * bool(named),
    ])  # fmt: skip


def write(name: str, outcomes: dict[str, Outcome], budgets: Sequence[int]) -> None:
    """Tables, JSON and plot."""
    texts = [report(case, outcome, budgets) for case, outcome in outcomes.items()]
    texts.append(one_setting(outcomes, budgets))
    write_text(name, "# Accuracy by network evaluations\n\n" + "\n\n".join(texts))
    write_json(name, {"cases": {case: outcome.plain() for case, outcome in outcomes.items()}})
    panels = {case: _panel(outcome, budgets) for case, outcome in outcomes.items()}
    plot_lines(name, panels, "network evaluations", "median relative error")


def _panel(outcome: Outcome, budgets: Sequence[int]) -> dict[str, tuple[list[float], list[float], bool]]:
    lines = {}
    for label, members in outcome.families().items():
        if members[0].ours and label not in ("auto", "DDIM", ADAPTIVE):
            continue
        at = sorted(members[0].errors) if label == ADAPTIVE else budgets
        tops = [(float(n), top.errors[n][0]) for n in at if (top := best(members, n)) is not None]
        lines[label] = ([n for n, _ in tops], [e for _, e in tops], members[0].ours)
    return lines


# -- cases ----------------------------------------------------------------------------------------------------------


def ddpm_process() -> Discrete:
    """Linear betas 1e-4 … 0.02 in 1000 steps."""
    return Discrete.from_betas(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))


def mixture_case(name: str, process: Process, exact: Mixture, starts: int) -> Case:
    """The exact score under a process, in float64."""
    shape = (starts, process.blocks, *exact.means.shape[2:])
    white = exact.reference()
    return Case(name, process, exact, _start(process, white, shape, torch.float64), white, exact.spectrum())


def model_case(source: str, starts: int, guidance: float | None = None) -> Case:
    """A trained network with its classes in turn, or with its captions under guidance of this weight, if any."""
    model = load(source)
    name = model.name
    if model.classes or guidance is not None:
        model = model.given(in_turn(model, starts), guidance)
    if guidance is not None:
        name += f", guidance {guidance:g}"
    start = _start(model.process, model.reference, model.state_shape(starts), torch.float32)
    return Case(name, model.process, model.denoiser, start, model.reference, guided=is_guided(model, guidance))


def _start(process: Process, reference: Gaussian, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    time = torch.tensor([process.t_max], dtype=torch.float64)
    state = root(process, time, reference)[0](z)
    if (mean := reference.mean_state(process, state)) is not None:
        state = state + process.signal(time)[0](mean)
    return state.to(dtype)


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    """Those that were asked for."""
    if arguments.cases in ("all", "mixture"):
        exact = mixture(arguments.data)
        kind = "MNIST" if arguments.data else "synthetic"
        field = tuple(exact.means.shape[2:])
        for name, process in (("VP", ddpm_process()), ("blurring", Blurring(field)), ("Langevin", Langevin())):
            yield mixture_case(f"mixture ({kind}), {name}", process, exact, arguments.starts)
    if arguments.cases in ("all", "zoo"):
        for name in names():
            yield model_case(name, arguments.starts)
    for source in arguments.model:
        yield model_case(source, arguments.starts, arguments.guidance)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help=".npz with x_train (uint8) for the mixture; synthetic images without")
    parser.add_argument("--cases", choices=("all", "mixture", "zoo", "none"), default="all")
    parser.add_argument("--model", action="append", default=[], help="a model's name or folder; may be repeated")
    parser.add_argument("--guidance", type=float, help="weight of the captions or classes of each --model")
    parser.add_argument("--starts", type=int, default=16)
    parser.add_argument("--budgets", type=int, nargs="+", default=list(BUDGETS), help="numbers of network evaluations")
    parser.add_argument(
        "--steps", type=int, help="of the reference; 1000 for the mixture and 300 for networks by default"
    )
    parser.add_argument("--full", action="store_true", help="every setting, the unlikely ones too")
    parser.add_argument(
        "--solver", action="append", default=[],
        help="measure it alone, a family or `family: settings`, and keep the file's other rows",
    )  # fmt: skip
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="accuracy", help="of the files in results/")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", module="diffusers")
    logging.getLogger("diffusers").setLevel(logging.ERROR)

    known = read_json(arguments.name).get("cases", {})
    outcomes = {case: Outcome.from_plain(values) for case, values in known.items()}
    for case in cases(arguments):
        if arguments.only not in case.name:
            continue
        began = time.perf_counter()
        kind = "mixture" if isinstance(case.denoiser, Mixture) else "network"
        exact, agreement = kept(case, arguments.steps or STEPS[kind])
        taken = time.perf_counter() - began
        print(f"{case.name}: reference in {taken:.0f} s, agreement {agreement:.1e}", flush=True)
        rows = []
        for row in measure(case, exact, arguments.budgets, every=arguments.full, only=arguments.solver):
            print(row, flush=True)
            rows.append(row)
        if arguments.solver and case.name in outcomes:
            anew = {(row.solver, row.settings, row.ours) for row in rows}
            rows += [row for row in outcomes[case.name].rows if (row.solver, row.settings, row.ours) not in anew]
            rows.sort(key=lambda row: (row.solver != "auto", not row.ours))
        outcomes[case.name] = Outcome(case.process.name, len(case.start), agreement, rows)
        print("\n" + report(case.name, outcomes[case.name], arguments.budgets) + "\n", flush=True)
        write(arguments.name, outcomes, arguments.budgets)


if __name__ == "__main__":
    main()
