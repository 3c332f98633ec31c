"""The pages of the API: every public name of `pushforward`, under the headings below, and the rooms of the package."""

import inspect
import re
from collections.abc import Iterable
from pathlib import Path

import pushforward

# Each name of the front door stands on one page; `write_pages` refuses to leave one out.
PAGES = {
    "Models and verbs": "Model load from_pipeline sample invert encode decode edit translate inpaint guide steer train"
    " evaluate log_likelihood watermark read_watermark Evaluation TrainConfig",
    "Maps from codes to images": "Diffusion AdaptiveDiffusion Code Pushforward Generator gan stylegan consistency"
    " load_generator",
    "Networks": "Network Function Denoiser PushforwardScheduler",
    "Processes": "Process VP VE Cosine Flow Blurring Langevin BlurringLangevin Discrete Gaussian PROCESSES"
    " process_from_config",
    "Plans": "Plan SOLVERS learn_plan load_plan save_plan",
    "Execution and gradients": "Parallel Exact Implicit Phantom Skeleton",
    "Guidance and steering": "Schedule langevin mala hmc pcn ess fk psi best Steering steered",
    "Errors": "PushforwardError Diverged FarOutside",
}
_INHERITED = "   :inherited-members: Module, Exception, object, ABC, Protocol, Generic\n"
_FOREIGN = {"PushforwardScheduler"}  # most of what it inherits is of diffusers
MODULES = {"Solvers": "plan.solvers", "Grids": "plan.grid", "Energies": "guidance.energies"}


def write_pages(folder: Path) -> None:
    """Write the pages, as far as they change."""
    rooms = [name for name in pushforward.__all__ if inspect.ismodule(getattr(pushforward, name))]
    shown = {name for names in PAGES.values() for name in names.split()}
    if missing := set(pushforward.__all__) - shown - set(rooms):
        raise RuntimeError(f"docs/site_parts/reference.py has no heading for {', '.join(sorted(missing))}.")
    folder.mkdir(exist_ok=True)
    pages = {title: _names(title, names.split()) for title, names in PAGES.items()}
    pages |= {title: _module(title, f"pushforward.{name}") for title, name in MODULES.items()}
    pages["Rooms"] = _rooms(rooms)
    for title, text in pages.items():
        _write(folder / f"{_slug(title)}.rst", text)
    contents = "".join(f"   {_slug(title)}\n" for title in pages)
    lead = "Everything that ``import pushforward as pf`` gives, as ``pf.name``, and the modules beneath."
    _write(folder / "index.rst", f"{_title('API')}\n{lead}\n\n.. toctree::\n   :maxdepth: 2\n\n{contents}")


def _names(title: str, names: Iterable[str]) -> str:
    parts = [_title(title), ".. currentmodule:: pushforward\n"]
    for name in names:
        value = getattr(pushforward, name)
        if isinstance(value, dict):
            parts.append(
                f".. py:data:: {name}\n\n   Names on the command line: {', '.join(map('`{}`'.format, value))}.\n"
            )
        elif inspect.isclass(value):
            parts.append(f".. autoclass:: {name}\n   :members:\n{_INHERITED if name not in _FOREIGN else ''}")
        else:
            parts.append(f".. autofunction:: {name}\n")
    return "\n".join(parts)


def _module(title: str, name: str) -> str:
    return f"{_title(title)}\n.. automodule:: {name}\n   :members:\n"


def _rooms(names: Iterable[str]) -> str:
    lead = "The package is a house of rooms on floors; a room imports what is below it (:doc:`/CONTRIBUTING`)."
    rooms = "\n".join(f".. automodule:: {getattr(pushforward, name).__name__}\n   :no-index:\n" for name in names)
    return f"{_title('Rooms')}\n{lead}\n\n{rooms}"


def _title(text: str) -> str:
    return f"{text}\n{'=' * len(text)}\n"


def _slug(title: str) -> str:
    return title.lower().replace(" ", "-")


def _write(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def as_rst(app: object, what: str, name: str, value: object, options: object, lines: list[str]) -> None:
    """Mark the code of a docstring, which is indented after a paragraph, as Sphinx wants it marked."""
    text = re.sub(r"(?:^\|.*\|$\n?)+", _table, "\n".join(lines), flags=re.MULTILINE)
    lines[:] = re.sub(r"(?<=\S)\n\n(?= {4}\S)(?! {4}[-*] )", "\n\n.. code-block:: text\n\n", text).split("\n")


def _table(found: re.Match[str]) -> str:
    """A table of Markdown as one of reStructuredText."""
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in found[0].splitlines())
    body = "".join("   * - " + "\n     - ".join(row) + "\n" for row in (head, *rows))
    return f".. list-table::\n   :header-rows: 1\n\n{body}\n"
