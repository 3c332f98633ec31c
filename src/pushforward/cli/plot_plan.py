"""Draw a plan: where it steps, and with which coefficients.

Examples are in `pushforward plot-plan --help`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from pushforward.cli._shared.checks import check_outputs
from pushforward.cli._shared.models import make_plan
from pushforward.cli._shared.options import (
    JsonOption,
    ModelArgument,
    PipelineOptions,
    SamplerOptions,
    grouped,
)
from pushforward.cli._shared.report import write_json
from pushforward.data.files import atomic_path, check_suffix
from pushforward.model import load
from pushforward.plan import Plan, Register

__all__ = ["plot_plan"]


@grouped()
def plot_plan(
    model: ModelArgument,
    sampler: SamplerOptions,
    *,
    out: Annotated[Path, typer.Option(help="Write the picture here (.png, .pdf, .svg).")] = Path("plan.png"),
    pipeline: PipelineOptions,
    json: JsonOption = None,
) -> None:
    r"""Draw a plan: where it steps, and with which coefficients.

    \b
    pushforward plot-plan fashion-vp --solver gddim --order 2 --steps 20
    pushforward plot-plan fashion-langevin --solver ddim --eta 0.5 --out langevin.png
    pushforward plot-plan fashion-blurring --solver unipc --json -
    """
    check_suffix(out, {".png", ".jpg", ".webp", ".pdf", ".svg"}, "Plots")
    check_outputs({"--out": out, "--json": json})
    chosen = load(model, **pipeline.asked)
    made = make_plan(chosen, sampler.plan_spec())
    with atomic_path(out) as path:
        draw(made, path)
    if json != "-":
        typer.echo(f"{out}: {made.solver} on {made.process.name!r}, {made.calls}")
    write_json(describe(made), json)


def describe(plan: Plan) -> dict[str, object]:
    """A plan as plain values: per node its time, and the entry largest in size of each register's coefficient."""
    nodes = [
        {
            "time": node.time,
            "asks": node.asks,
            "terms": {f"{register.kind} {register.node}": one.largest() for register, one in node.terms.items()},
        }
        for node in plan.nodes
    ]
    return {"process": plan.process.name, "solver": plan.solver, "nfe": plan.nfe, "rounds": plan.rounds, "nodes": nodes}


def draw(plan: Plan, path: Path) -> None:
    """Log-SNR of the states against time, and the largest entry of each coefficient.

    For states and answers that is a matrix (a row is a node, a column the node it uses), for the noise, if any, bars.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    count = 4 if plan.noises else 3
    figure = Figure(figsize=(3.8 * count, 3.6), layout="constrained")
    panels = figure.subplots(1, count)
    times = plan.node_times
    inside = (times > 0) & (times < plan.process.t_max)
    chain = torch.zeros_like(inside)
    chain[list(plan.steps)] = True
    dense = torch.linspace(0.0, 1.0, 400, dtype=torch.float64)[1:-1] * plan.process.t_max
    panels[0].plot(dense, plan.process.log_snr(dense), color="0.8", zorder=0)
    for marker, chosen, label in (("o", inside & chain, "states"), ("x", inside & ~chain, "stages")):
        if bool(chosen.any()):
            panels[0].scatter(times[chosen], plan.process.log_snr(times[chosen]), s=14, marker=marker, label=label)
    panels[0].set(xlabel="time", ylabel="log(signal / noise)", title=f"{plan.solver} on {plan.process.name}")
    panels[0].legend()
    for panel, kind in ((panels[1], "state"), (panels[2], "answer")):
        size = len(plan.nodes)
        matrix = torch.full((size, size), torch.nan, dtype=torch.float64)
        for k, node in enumerate(plan.nodes):
            for register, operator in node.terms.items():
                if register.kind == kind:
                    matrix[k, register.node] = operator.largest()
        largest = float(matrix.nan_to_num().abs().max()) or 1.0
        drawn = panel.imshow(matrix, cmap="RdBu", vmin=-largest, vmax=largest, interpolation="nearest")
        panel.set(xlabel=f"{kind} of node", ylabel="node", title=f"coefficient of each {kind}")
        figure.colorbar(drawn, ax=panel, shrink=0.8)
    if plan.noises:
        sizes = [abs(plan.nodes[k].terms[Register("noise", k)].largest()) for k in plan.noises]
        panels[3].barh(plan.noises, sizes)
        panels[3].invert_yaxis()
        panels[3].set(xlabel="noise", ylabel="node", title="noise added")
    for panel in panels[1:]:
        panel.yaxis.set_major_locator(MaxNLocator(integer=True))
    for panel in panels[1:3]:
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, dpi=110)
