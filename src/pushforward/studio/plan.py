"""Plan: the coefficients of a solver as a picture, with words on each."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from pushforward.data.words import many
from pushforward.errors import PushforwardError
from pushforward.studio._shared.controls import TakeAway, buttons, solver_choice, wire
from pushforward.studio._shared.models import Shelf, steps_beside
from pushforward.studio._shared.results import call, line, options
from pushforward.studio._shared.told import Updates

if TYPE_CHECKING:
    from pushforward.plan import Plan
    from pushforward.verbs import Model

__all__ = ["Entry", "Settings", "Shown", "command", "layout", "program", "run"]

NODES = 120
KINDS = ("state", "answer", "noise")
_SAYS = {
    "state": "times the state at {there}",
    "answer": "times the network's answer at {there}",
    "noise": "times fresh noise",
}


@dataclass(frozen=True)
class Settings:
    """Whose coefficients are shown; the same as of `pushforward plot-plan`."""

    model: str
    solver: str = "gddim:order=2"
    steps: int = 10


@dataclass(frozen=True)
class Entry:
    """A coefficient: its largest entry, where it is one for each frequency or for position and velocity."""

    node: int
    kind: str
    of: int
    value: float


@dataclass(frozen=True)
class Shown:
    """The plan in words, its coefficients, and their picture in HTML."""

    says: str
    entries: tuple[Entry, ...]
    picture: str


def command(settings: Settings) -> list[str]:
    """The arguments of `pushforward` that draw the same plan."""
    said = options(solver=settings.solver, steps=steps_beside(settings.solver, settings.steps), out="plan.png",
                   json="plan.json")  # fmt: skip
    return ["plot-plan", settings.model, *said]


def program(settings: Settings) -> str:
    """The plan in Python."""
    made = call("model.plan", settings.solver, steps_beside(settings.solver, settings.steps))
    lines = ["import pushforward as pf", "", f"model = {call('pf.load', settings.model)}", f"plan = {made}"]
    return "\n".join([*lines, "for node in plan.nodes:", "    print(node.time, node.terms)"])


def run(model: Model, settings: Settings) -> Generator[Shown, None, None]:
    """The plan.

    Raises:
        PushforwardError: a plan of too many states to be looked at, or none.
    """
    plan = model.plan(settings.solver, steps_beside(settings.solver, settings.steps))
    if len(plan.nodes) > NODES:
        raise PushforwardError(f"This plan has {many(len(plan.nodes), 'state')}; take fewer steps, to be looked at.")
    entries = []
    for k, node in enumerate(plan.nodes):
        for register, operator in node.terms.items():
            if register.kind in KINDS:
                entries.append(Entry(k, register.kind, register.node, operator.largest()))
    says = f"{plan.solver} on {plan.process.name}: {plan.calls}"
    says += f", noise in {many(len(plan.noises), 'step')}" if plan.noises else ", no noise"
    matrices = "".join(_matrix(plan, entries, kind) for kind in KINDS)
    words = "<br>".join(_words(plan, entry) for entry in entries)
    shown = f'<div style="display:flex;flex-wrap:wrap;gap:16px">{matrices}</div>'
    yield Shown(says, tuple(entries), f"{shown}<details><summary>All in words</summary>{words}</details>")


def _words(plan: Plan, entry: Entry) -> str:
    """A coefficient in words, which are all there is to who has no pointer."""
    times = f"State {entry.node} (t = {plan.nodes[entry.node].time:.3g})"
    there = f"state {entry.of} (t = {plan.nodes[entry.of].time:.3g})"
    return escape(f"{times} takes {entry.value:.4g} {_SAYS[entry.kind].format(there=there)}")


def _matrix(plan: Plan, entries: list[Entry], kind: str) -> str:
    """The coefficients of one kind: a row is a state that is made, a column one that it is made of."""
    mine = [entry for entry in entries if entry.kind == kind]
    if not mine:
        return ""
    size, largest = len(plan.nodes), max(abs(entry.value) for entry in mine) or 1.0
    cells = []
    for entry in mine:
        fill = f'fill="{"#0072b2" if entry.value > 0 else "#d55e00"}" fill-opacity="{abs(entry.value) / largest:.3f}"'
        place = f'x="{entry.of}" y="{entry.node}" width="1" height="1"'
        cells.append(f"<rect {place} {fill}><title>{_words(plan, entry)}</title></rect>")
    says = f"Coefficient of each {kind}: blue adds, orange takes away, {largest:.3g} at most"
    return (
        f'<figure style="flex:1 1 260px;max-width:420px;margin:0"><figcaption>{says}</figcaption>'
        f'<svg viewBox="-.5 -.5 {size + 1} {size + 1}" role="img" aria-label="{says}" style="width:100%">'
        f'<rect x="0" y="0" width="{size}" height="{size}" fill="none" stroke="currentColor" stroke-width=".05"/>'
        f"{''.join(cells)}</svg></figure>"
    )


def layout(shelf: Shelf, model: Any) -> list[Any]:
    """The tab; it has nothing to offer of the model's classes or captions."""
    import gradio as gr

    standard = Settings("")
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            solver = solver_choice(standard.solver)
            steps = gr.Slider(1, 50, standard.steps, step=1, label="Steps")
            go, stop = buttons("Show the plan")
        with gr.Column(scale=2, min_width=300):
            says = gr.Markdown("", elem_id="plan-says")
            shown = gr.HTML(elem_id="plan-picture")
            taken = TakeAway("plan")

    def act(data: Mapping[Any, Any]) -> Updates:
        settings = Settings(data[model], data[solver].strip(), int(data[steps]))
        words, script = line(command(settings)), program(settings)
        yield {taken.shell: words, taken.python: script}
        for news in run(shelf.open(settings.model), settings):
            files = {"plan.html": f"<!doctype html><title>{news.says}</title>{news.picture}".encode()}
            reading = "A row is a state, a column what it is made of; point at a cell to read it, or read all below."
            yield {says: f"{news.says}. {reading}", shown: news.picture,
                   **taken.handed(files, news.says, words, script)}  # fmt: skip

    wire(go, stop, act, {model, solver, steps}, says, {shown: ""}, taken)
    return []
