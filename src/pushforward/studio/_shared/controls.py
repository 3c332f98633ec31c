"""What several tabs have in common: controls, results to take away, and how a button starts and stops work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from pushforward.studio._shared.results import packed
from pushforward.studio._shared.told import Updates, spoken

__all__ = [
    "SOLVERS_OFFERED",
    "TakeAway",
    "buttons",
    "guidance_number",
    "picture_area",
    "seed_number",
    "solver_choice",
    "what_choice",
    "wire",
]

SOLVERS_OFFERED = (
    "auto", "ddim", "ddim:eta=0.5", "ddpm", "gddim:order=2", "gddim:order=3", "dpm++", "unipc", "heun", "midpoint",
    "exponential", "collocation", "rk45",
)  # fmt: skip


def what_choice(label: str, info: str, *, offered: Sequence[str] = (), multiple: bool = False) -> Any:
    """Classes or prompts: those that are known are offered, by default a model's, and others may be written."""
    import gradio as gr

    return gr.Dropdown(list(offered), value=None, label=label, info=info, multiselect=multiple, allow_custom_value=True)


def solver_choice(value: str = "auto", offered: tuple[str, ...] = SOLVERS_OFFERED) -> Any:
    """A solver, alone or with settings."""
    import gradio as gr

    return gr.Dropdown(list(offered), value=value, label="Solver", allow_custom_value=True,
                       info="With settings after colons if need be, as gddim:order=2.")  # fmt: skip


def guidance_number(value: float = 0, info: str = "0: the model's own.") -> Any:
    """The weight of guidance; 0 stands for the model's own, if `info` does not say otherwise."""
    import gradio as gr

    return gr.Number(value, label="Guidance", min_width=100, info=info)


def seed_number() -> Any:
    """The seed, any whole number, as elsewhere."""
    import gradio as gr

    return gr.Number(0, label="Seed", precision=0, min_width=100, info="Chooses the codes.")


def buttons(name: str) -> tuple[Any, Any]:
    """A button that starts, and one that stops, which can be pressed while there is work."""
    import gradio as gr

    with gr.Row():
        return gr.Button(name, variant="primary"), gr.Button("Stop", variant="stop", interactive=False)


def picture_area(label: str, says: str, elem_id: str) -> Any:
    """A picture of results; `says` is read out where it is not seen."""
    import gradio as gr

    return gr.Image(label=label, format="png", interactive=False, buttons=["download", "fullscreen"], alt_text=says,
                    elem_id=elem_id)  # fmt: skip


class News(Protocol):
    """What there is to see so far: words, and at the end files."""

    @property
    def says(self) -> str: ...

    @property
    def files(self) -> Mapping[str, bytes]: ...


_News = TypeVar("_News", bound=News)


class TakeAway:
    """The command, the program, and the files of a result.

    Args:
        name: name of the file, without its end.
    """

    def __init__(self, name: str) -> None:
        import gradio as gr

        self.name = name
        with gr.Accordion("The same without this page", open=False):
            # Gradio's colours of languages are too light to read, and its line numbers slip where lines wrap.
            self.shell, self.python = (
                gr.Code(label=label, lines=1, max_lines=20, wrap_lines=True, interactive=False,
                        show_line_numbers=False, elem_id=f"{name}-{label.lower()}") for label in ("Command", "Python")
            )  # fmt: skip
        self.files = gr.DownloadButton("Download results and settings", interactive=False, elem_id=f"{name}-files")

    @property
    def none(self) -> dict[Any, Any]:
        """All of it as there is no result."""
        import gradio as gr

        return {self.shell: "", self.python: "", self.files: gr.update(interactive=False)}

    def handed(self, files: Mapping[str, bytes], says: str, command: str, program: str) -> dict[Any, Any]:
        """What changes as files are there, if they are."""
        import gradio as gr
        from gradio.processing_utils import save_bytes_to_cache

        if not files:
            return {}
        data = packed(files, says, command, program)
        path = save_bytes_to_cache(data, f"{self.name}.zip", self.files.GRADIO_CACHE)
        return {self.files: gr.DownloadButton(value=path, interactive=True)}

    def follow(
        self,
        news: Iterable[_News],
        command: str,
        program: str,
        says: Any,
        show: Callable[[_News], Mapping[Any, Any]],
    ) -> Updates:
        """Updates of a tab's outputs as its work goes on.

        Args:
            news: what there is to see so far, again and again.
            command: the command that makes the same.
            program: the program.
            says: the output that tells how far it is.
            show: new values of the tab's own outputs.
        """
        yield {self.shell: command, self.python: program}
        for one in news:
            yield {says: one.says, **show(one), **self.handed(one.files, one.says, command, program)}


def wire(
    go: Any,
    stop: Any,
    act: Callable[[Any], Updates],
    inputs: set[Any],
    says: Any,
    empty: Mapping[Any, Any],
    taken: TakeAway,
) -> None:
    """Have a button start work, one visitor's after another's, and another one stop it.

    Args:
        go: starts it; a second click while it runs does nothing.
        stop: stops it.
        act: given the values of the inputs, yields new values of some outputs.
        inputs: whose values it takes.
        says: the output that tells how far it is.
        empty: the tab's own outputs, each with what it is without a result. The first shows that there is work, or a
            place in the queue.
        taken: the result to take away.
    """
    none = {**empty, **taken.none}  # lest what an earlier run has left is taken for this one's, which may fail
    # A click before the work has really ended is lost, so the button shows when it can be pressed.
    go.click(None, None, [go, stop], js=_pressable(False), api_visibility="private")
    event = go.click(
        spoken(act, says, none), inputs, [says, *none], concurrency_id="models", concurrency_limit=1,
        show_progress="minimal", show_progress_on=next(iter(empty)), api_visibility="private", trigger_mode="once",
    )  # fmt: skip
    stop.click(lambda: "Stopped.", None, says, cancels=[event], queue=False, api_visibility="private")
    for ended in (event.success, event.failure):  # stopping is a failure
        ended(None, None, [go, stop], js=_pressable(True), api_visibility="private")


def _pressable(can: bool) -> str:
    """Let the first button be pressed and not the second, or the other way round."""
    first, second = (f"{{__type__: 'update', interactive: {str(one).lower()}}}" for one in (can, not can))
    return f"() => [{first}, {second}]"
