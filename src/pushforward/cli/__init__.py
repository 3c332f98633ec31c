"""The command line: one module of this folder is one command.

`plot_plan.py` is the command `pushforward plot-plan`: its docstring's first line is the help in the list of commands,
and its function `plot_plan` runs the command, with typer's annotations for arguments. A new command is a new file.

A command's module is imported only when the command runs or its own help is asked, so `pushforward --help` waits for
no PyTorch. For the same reason nothing here, nor in `pushforward/__init__.py`, imports it.
"""

import ast
import inspect
import os
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from pushforward.errors import PushforwardError
from pushforward.locks import alone

__all__ = ["app", "command_names", "main"]

_NOT_COMMANDS = {"__init__", "batch", "common"}


def command_names() -> list[str]:
    """The commands' names, in the order of the alphabet."""
    modules = {file.stem for file in Path(__file__).parent.glob("*.py")} - _NOT_COMMANDS
    return sorted(module.replace("_", "-") for module in modules)


def _module_name(command: str) -> str:
    return command.replace("-", "_")


def _summary(command: str) -> str:
    """The first line of a command's module docstring, read without importing the module."""
    source = Path(__file__).with_name(f"{_module_name(command)}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def _typer(**settings: Any) -> typer.Typer:
    return typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, **settings)


class _Commands(TyperGroup):
    """The modules of this folder as commands. `ctx` and `formatter` are click's, which typer carries privately."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """`--json` with nothing after it writes to stdout."""
        pairs = zip(args, [*args[1:], "--"], strict=True)
        given = [
            word for arg, after in pairs for word in ([arg, "-"] if (arg, after[:2]) == ("--json", "--") else [arg])
        ]
        return super().parse_args(ctx, given)

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002
        return command_names()

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in command_names():
            ctx.fail(f"There is no command {cmd_name!r}; there are: {', '.join(command_names())}.")
        name = _module_name(cmd_name)
        command = _typer()
        function = getattr(import_module(f"{__name__}.{name}"), name)
        described = (inspect.getdoc(function) or "").replace("\\b\n", "\b\n")  # docstrings are raw
        command.command(cmd_name, help=described)(_alone(function))
        return typer.main.get_command(command)

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002
        if rows := [(name, _summary(name)) for name in command_names()]:
            with formatter.section("Commands"):
                formatter.write_dl(rows)


def _alone(command: Callable[..., None]) -> Callable[..., None]:
    """The command, while no other process writes to the same `out`."""

    @wraps(command)
    def called(**options: Any) -> None:
        with alone(options["out"]) if options.get("out") is not None else nullcontext():
            command(**options)

    return called


app = _typer(cls=_Commands, no_args_is_help=True)


def _print_version(asked: bool | None) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(version("pushforward"))
        raise typer.Exit


@app.callback()
def _pushforward(
    version: Annotated[
        bool | None,
        typer.Option("--version", help="Print the version and leave.", callback=_print_version, is_eager=True),
    ] = None,
) -> None:
    """Diffusion models as maps between Gaussian codes and images."""


def _fail(message: str) -> NoReturn:
    typer.echo(f"pushforward: {message}", err=True)
    sys.exit(1)


def main() -> None:
    """Run the command line.

    Exits with 0, with 1 and one sentence on stderr where something failed, with 2 for a wrong usage, with 130 for an
    interrupt and 143 for a request to end. `PUSHFORWARD_DEBUG=1` leaves the traceback of a failure.
    """
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what is done is kept
    if os.environ.get("PUSHFORWARD_DEBUG") == "1":
        app()
    try:
        app()
    except PushforwardError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        _fail(f"{reason}: {error.filename}" if error.filename else reason)
    except Exception as error:
        _fail(f"{type(error).__name__}: {error} (PUSHFORWARD_DEBUG=1 shows where)")
    finally:
        signal.signal(signal.SIGTERM, before)
