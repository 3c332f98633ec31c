r"""How near each solver comes to the exact solution of the probability flow, by number of network evaluations (NFE).

Every solver starts from the same states at the noisiest time and ends at clean data; what it costs is counted to the
last network call, a final denoise included. The reference is the flow followed to the least noise the network was
trained for, in a thousand steps and more, and then the network's denoised state there; two unlike solvers must agree
on it. The error of one start is the root-mean-square difference over the root-mean-square of the reference; the tables
give the median over the starts (the JSON also the worst).

    python benchmarks/accuracy.py                                   # a synthetic mixture, and the models of the package
    python benchmarks/accuracy.py --data mnist.npz --cases mixture  # the mixture around real images
    python benchmarks/accuracy.py --model runs/my-model --cases none

The peers are the schedulers of `diffusers` on the same network. Each is given every choice of its own options (spacing,
Karras, exponential, beta and Lu noise levels, order, prediction type, last step), and is shown with the choice that is best
*at that NFE*, in hindsight. Ours, `auto`, is one rule.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _common import plot_lines, relative_errors, table, write_json, write_text
from _mixture import Mixture, mixture
from _peers import Handed, Peer, peers, run_peer
from torch import Tensor

from pushforward.errors import PushforwardError
from pushforward.execute import run
from pushforward.linear import POINT, Blurring, Discrete, Gaussian, Langevin, Process, ScaledProcess, root
from pushforward.model import Denoiser, load
from pushforward.model.zoo import names
from pushforward.plan import Plan, auto, ddim, dpm_solver_pp, exponential, gddim, grid, runge_kutta, unipc

BUDGETS = (5, 8, 10, 15, 20, 30, 50)
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
    """

    name: str
    process: Process
    denoiser: Denoiser
    start: Tensor
    white: Gaussian
    spectrum: Gaussian | None = None

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
    scale = math.sqrt(float(torch.as_tensor(case.white.variance)))
    grids: dict[str, Callable[[Process, int], Tensor]] = {
        "uniform": grid.uniform,
        "quadratic": grid.power,
        "log-snr": grid.log_snr,
        "karras": grid.karras,
        "angle": partial(grid.angle, scale=scale),
    }

    def on(name: str, make: Make) -> Callable[[Process, int], Plan]:
        return lambda process, steps: make(process, grids[name](process, steps))

    yield Ours("auto", "", lambda process, steps: auto(process, steps, case.white))
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
        for order, corrector, name in ((o, c, g) for o in (1, 2, 3) for c in (None, "reuse") for g in ("log-snr", "angle")):
            chosen = partial(exponential, order=order, corrector=corrector, reference=reference, variable=variable)
            yield Ours(f"exponential {words}", f"order {order}, corrector {corrector}, {name}", on(name, chosen))
        chosen = partial(exponential, order=2, corrector="evaluate", reference=reference, variable=variable)
        settings = "order 2, corrector evaluate, angle"
        yield Ours(f"exponential {words}", settings, on("angle", chosen), calls=lambda n: 2 * n - 1)


FEW = {
    "auto", "DDIM: angle", "DDIM: quadratic", "DPM-Solver++ 2M: log-snr", "DPM-Solver++ 2M: angle", "UniPC 2: log-snr",
    "UniPC 3: log-snr", "gDDIM 2: quadratic", "heun: karras", "exponential C = 0: order 1, corrector reuse, log-snr",
    "exponential C = 0: order 2, corrector None, angle",
    "exponential C = s^2: order 1, corrector reuse, angle", "exponential C = s^2: order 2, corrector None, angle",
    "exponential C = s^2: order 2, corrector reuse, angle",
}  # fmt: skip


# -- the reference --------------------------------------------------------------------------------------------------


def converged(case: Case, steps: int) -> tuple[Tensor, float]:
    """The exact solution, and how far two solvers are apart on it (worst start)."""
    process = case.process
    clean = torch.zeros(1, dtype=torch.float64)

    def to_least_noise(make: Callable[..., Tensor], count: int, **settings: float) -> Tensor:
        return torch.cat([make(process, count, end=process.t_min, **settings), clean])

    first = exponential(process, to_least_noise(grid.log_snr, steps), order=2, variable="log-snr")
    second = runge_kutta(process, to_least_noise(grid.karras, steps // 2, rho=10.0), tableau="heun", coordinates="noise")
    with torch.no_grad():
        a, b = (run(plan, case.denoiser, case.start) for plan in (first, second))
    return a, float(relative_errors(b, a).max())


# -- measuring ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """What one solver with one choice of settings reached; errors `{nfe: (median, worst)}`."""

    solver: str
    settings: str
    ours: bool
    errors: dict[int, tuple[float, float]]


def measure(case: Case, exact: Tensor, budgets: Sequence[int], *, full: bool, say: Callable[[str], None]) -> list[Row]:
    """Every solver of ours and every peer at every budget."""
    rows = []
    for ours in solvers(case):
        name = f"{ours.family}: {ours.settings}" if ours.settings else ours.family
        if not full and name not in FEW:
            continue
        errors = {}
        for nfe in budgets:
            try:
                plan = ours.within(case.process, nfe)
                with torch.no_grad():
                    errors[nfe] = _summary(run(plan, case.denoiser, case.start), exact)
            except PushforwardError:
                continue
        rows.append(Row(ours.family, ours.settings, True, errors))
        say(f"  {name}: " + ", ".join(f"{n}: {e[0]:.1e}" for n, e in errors.items()))
    if case.has_peers:
        handed = Handed(case.process, case.denoiser, case.start)
        for peer in peers():
            if full or _promising(peer):
                rows.append(_measured_peer(peer, handed, case.start, exact, budgets))
                say(f"  diffusers {peer.scheduler}: {peer.label}: " + ", ".join(f"{n}: {e[0]:.1e}" for n, e in rows[-1].errors.items()))
    return rows


def _measured_peer(peer: Peer, handed: Handed, start: Tensor, exact: Tensor, budgets: Sequence[int]) -> Row:
    errors = {}
    for nfe in budgets:
        with torch.no_grad():
            result = run_peer(peer, handed, start, nfe)
        if result is not None and bool(result.isfinite().all()):
            errors[nfe] = _summary(result, exact)
    return Row(peer.scheduler, peer.label, False, errors)


def _promising(peer: Peer) -> bool:
    """One prediction type and the usual variant: on the mixture the others differ by a few percent at most."""
    return peer.options["prediction_type"] == "epsilon" and peer.options.get("solver_type", "bh2") == "bh2"


def _summary(state: Tensor, exact: Tensor) -> tuple[float, float]:
    errors = relative_errors(state, exact)
    return float(errors.median()), float(errors.max())


def best(rows: Sequence[Row], nfe: int) -> Row | None:
    """The row with the least median error at this budget."""
    able = [row for row in rows if nfe in row.errors and math.isfinite(row.errors[nfe][0])]
    return min(able, key=lambda row: row.errors[nfe][0], default=None)


def report(case: Case, rows: list[Row], budgets: Sequence[int], agreement: float) -> str:
    """The tables of a case."""
    families = list(dict.fromkeys((row.solver, row.ours) for row in rows))
    columns = ["solver", *map(str, budgets)]
    lines, winners = [], []
    for family, ours in families:
        members = [row for row in rows if (row.solver, row.ours) == (family, ours)]
        chosen = [best(members, nfe) for nfe in budgets]
        lines.append(
            [family if ours else f"diffusers {family}"]
            + [None if row is None else row.errors[nfe][0] for row, nfe in zip(chosen, budgets, strict=True)]
        )
    theirs = [row for row in rows if not row.ours]
    own = next(row for row in rows if row.solver == "auto")
    if theirs:
        tops = [best(theirs, nfe) for nfe in budgets]
        ratios = [
            None if top is None else own.errors[nfe][0] / top.errors[nfe][0] for top, nfe in zip(tops, budgets, strict=True)
        ]
        lines.append(["**auto / best peer**", *ratios])
        winners = [f"- {nfe}: {top.solver}, {top.settings}" for top, nfe in zip(tops, budgets, strict=True) if top]
    least = min(error[0] for row in rows for error in row.errors.values())
    text = [
        f"## {case.name}",
        f"{len(case.start)} starts, process `{case.process.name}`. Median relative error by network evaluations; of each "
        "solver the settings that are best at that budget, but `auto` is one rule.",
        f"The two reference solvers agree to {agreement:.1e} (worst start); the least error in the table is {least:.1e}.",
        table(columns, lines),
    ]
    if winners:
        text.append("Best peers:\n\n" + "\n".join(winners))
    return "\n\n".join(text)


# -- cases ----------------------------------------------------------------------------------------------------------


def ddpm_process() -> Discrete:
    """Linear betas 1e-4 … 0.02 in 1000 steps."""
    return Discrete.from_betas(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))


def mixture_case(name: str, process: Process, exact: Mixture, starts: int) -> Case:
    """The exact score under a process, in float64."""
    shape = (starts, process.blocks, *exact.means.shape[2:])
    return Case(name, process, exact, _start(process, exact.reference(), shape, torch.float64), exact.reference(), exact.spectrum())


def model_case(source: str, starts: int) -> Case:
    """A trained network, with labels in turn where it has classes."""
    model = load(source)
    if model.classes:
        model = model.given(torch.arange(starts) % len(model.classes))
    start = _start(model.process, model.reference, model.state_shape(starts), torch.float32)
    return Case(model.name, model.process, model.denoiser, start, model.reference)


def _start(process: Process, reference: Gaussian, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    time = torch.tensor([process.t_max], dtype=torch.float64)
    state = root(process, time, reference)[0](z)
    if isinstance(reference.mean, Tensor):
        state = state + process.transition(time, torch.zeros_like(time))[0](process.lift(reference.mean[None].double()))
    return state.to(dtype)


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    """Those that were asked for."""
    if arguments.cases in ("all", "mixture"):
        exact = mixture(arguments.data)
        kind = "MNIST" if arguments.data else "synthetic"
        field = tuple(exact.means.shape[2:])
        for name, process in (("VP", ddpm_process()), ("blurring", Blurring(field)), ("Langevin", Langevin())):
            yield mixture_case(f"mixture ({kind}), {name}", process, exact, arguments.starts or 16)
    if arguments.cases in ("all", "zoo"):
        for name in names():
            yield model_case(name, arguments.starts or 4)
    for source in arguments.model:
        yield model_case(source, arguments.starts or 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help=".npz with x_train (uint8) for the mixture; synthetic images without")
    parser.add_argument("--cases", choices=("all", "mixture", "zoo", "none"), default="all")
    parser.add_argument("--model", action="append", default=[], help="a model's name or folder; may be repeated")
    parser.add_argument("--starts", type=int, help="16 for the mixture and 4 for networks by default")
    parser.add_argument("--budgets", type=int, nargs="+", default=list(BUDGETS), help="numbers of network evaluations")
    parser.add_argument("--steps", type=int, default=1000, help="of the reference")
    parser.add_argument("--few", action="store_true", help="leave out what is far behind; always so for networks unless --full")
    parser.add_argument("--full", action="store_true", help="every setting on networks too")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="accuracy", help="of the files in results/")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", module="diffusers")
    logging.getLogger("diffusers").setLevel(logging.ERROR)

    texts, content, panels = [], {}, {}
    for case in cases(arguments):
        if arguments.only not in case.name:
            continue
        began = time.perf_counter()
        exact, agreement = converged(case, arguments.steps)
        print(f"{case.name}: reference after {time.perf_counter() - began:.0f} s, agreement {agreement:.1e}", flush=True)
        full = arguments.full or (isinstance(case.denoiser, Mixture) and not arguments.few)
        rows = measure(case, exact, arguments.budgets, full=full, say=partial(print, flush=True))
        texts.append(report(case, rows, arguments.budgets, agreement))
        print("\n" + texts[-1] + "\n", flush=True)
        content[case.name] = {"agreement": agreement, "starts": len(case.start), "rows": [_plain(row) for row in rows]}
        panels[case.name] = _panel(rows, arguments.budgets)
        write_text(arguments.name, "# Accuracy by network evaluations\n\n" + "\n\n".join(texts))
        write_json(arguments.name, {"cases": content})
        plot_lines(arguments.name, panels, "network evaluations", "median relative error")


def _plain(row: Row) -> dict[str, Any]:
    errors = {str(n): [float(f"{x:.3g}") for x in e] for n, e in row.errors.items()}
    return {"solver": row.solver, "settings": row.settings, "ours": row.ours, "errors": errors}


def _panel(rows: list[Row], budgets: Sequence[int]) -> dict[str, tuple[list[float], list[float], bool]]:
    lines = {}
    for family, ours in dict.fromkeys((row.solver, row.ours) for row in rows):
        if ours and family not in ("auto", "DDIM"):
            continue
        members = [row for row in rows if (row.solver, row.ours) == (family, ours)]
        tops = [(n, top.errors[n][0]) for n in budgets if (top := best(members, n)) is not None]
        label = family if ours else f"diffusers {family}"
        lines[label] = ([n for n, _ in tops], [e for _, e in tops], ours)
    return lines


if __name__ == "__main__":
    main()
