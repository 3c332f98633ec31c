"""The command line: one module of this folder is one command.

`plot_plan.py` is the command `pushforward plot-plan`: its docstring's first line is the help in the list of commands,
and its function `plot_plan` runs the command, with typer's annotations for arguments. A new command is a new file.

A command's module is imported only when the command runs or its own help is asked, so `pushforward --help` waits for
no PyTorch. For the same reason nothing here, nor in `pushforward/__init__.py`, imports it.
"""

import ast
import errno
import inspect
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from pushforward.cli._shared.checks import noted
from pushforward.cli._shared.report import remark
from pushforward.data.files import NOT_WRITTEN
from pushforward.data.locks import alone
from pushforward.data.memory import is_lack
from pushforward.errors import FarOutside, PushforwardError

__all__ = ["app", "command_names", "main"]

_ALONE = {"--json": "-", "--parallel": "preconditioned"}  # what options mean that are given without a value
PLACES = {
    "--animate", "--control", "--data", "--each", "--image", "--json", "--mask", "--out", "--picture", "--save",
    "--statistics",
}  # options whose value is a file or a folder  # fmt: skip
_NOT_COMMANDS = {"__init__"}


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


class _Ended(SystemExit):
    """The request to end (SIGTERM), on its way through what is to be cleaned up."""


class _Command(TyperCommand):
    """A command, which ends by returning or by `typer.Exit`: code that it runs for the user cannot end it."""

    def invoke(self, ctx: Any) -> Any:
        given = {p.name for p in self.params if p.name and ctx.get_parameter_source(p.name).name == "COMMANDLINE"}
        try:
            with noted(given):
                return super().invoke(ctx)
        except (_Ended, Exception):
            raise
        except KeyboardInterrupt:
            remark("interrupted")
            raise
        except BaseException as left:
            last = traceback.extract_tb(left.__traceback__)[-1]
            what = f"{type(left).__name__}{f': {left}' if str(left) else ''}"
            raise PushforwardError(
                f"{last.filename}, line {last.lineno}, asks Python to exit ({what}): a function that a command calls "
                "must return or raise an error."
            ) from left


class _Commands(TyperGroup):
    """The modules of this folder as commands. `ctx` and `formatter` are click's, which typer carries privately."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Options of `_ALONE` with nothing after them, or with another option, take the value they have there.

        `~/` begins a path in the user's home, as shells read it, but in quotes and after `=` they leave that to us.
        A command may be called in two words, as `watermark read`, where the first is none alone.

        Raises:
            PushforwardError: a path is empty, as of a variable that is not set: it would be this folder.
        """
        for before, arg in zip(["", *args], args, strict=False):
            option, equals, value = arg.partition("=") if arg.startswith("--") else (before, "=", arg)
            if not value and equals and (option in PLACES or not option.startswith("-")):
                what = f"The value of {option}" if option in PLACES else "An argument"
                raise PushforwardError(f"{what} is empty; write one, or leave it out.")
        if len(args) > 1 and args[0] not in command_names() and f"{args[0]}-{args[1]}" in command_names():
            args = [f"{args[0]}-{args[1]}", *args[2:]]
        given = []
        for arg, after in zip(args, [*args[1:], "--"], strict=True):
            option, equals, value = arg.partition("=") if arg.startswith("--") else ("", "", arg)
            given.append(option + equals + (os.path.expanduser(value) if value.startswith("~/") else value))
            if arg in _ALONE and after.startswith("-") and after != "-":
                given.append(_ALONE[arg])
        return super().parse_args(ctx, given)

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002
        return command_names()

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in command_names():
            if longer := [name for name in command_names() if name.startswith(f"{cmd_name}-")]:
                ctx.fail(f"The command {cmd_name!r} has a second word: {' or '.join(longer).replace('-', ' ')}.")
            ctx.fail(f"There is no command {cmd_name!r}; there are: {', '.join(command_names())}.")
        name = _module_name(cmd_name)
        command = _typer()
        function = getattr(import_module(f"{__name__}.{name}"), name)
        described = (inspect.getdoc(function) or "").replace("\\b\n", "\b\n")  # docstrings are raw
        command.command(cmd_name, cls=_Command, help=described)(_alone(function))
        return typer.main.get_command(command)

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002
        if rows := [(name, _summary(name)) for name in command_names()]:
            with formatter.section("Commands"):
                formatter.write_dl(rows)


def _alone(command: Callable[..., None]) -> Callable[..., None]:
    """The command, while no other process writes to the same `out`, which is not left without a result."""

    @wraps(command)
    def called(**options: Any) -> None:
        if options.get("out") is None:
            command(**options)
            return
        from pushforward.cli._shared.batch import removed_if_empty

        with alone(options["out"]), removed_if_empty(Path(options["out"])):
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
    remark(message)
    sys.exit(1)


def _said(error: Exception) -> str:
    """An error in a sentence."""
    words = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, PushforwardError):
        return str(error)
    if is_lack(error):
        return f"There is not enough memory for this; take a smaller --batch, --count or --size. ({words[:300]})"
    if isinstance(error, OSError):
        name = error.filename if error.filename is not None else error.filename2
        reason = error.strerror or words
        if name is None and error.errno in NOT_WRITTEN:
            name = "standard output"  # errors of files are named where they are written
        return reason if name is None else f"{reason}: {os.fsdecode(name) if not isinstance(name, int) else name}"
    if isinstance(error, RuntimeError) and words.startswith("Symlink loop"):  # as Python 3.11 says it
        return f"{os.strerror(errno.ELOOP)}: {words.partition(' from ')[2]}"
    return f"{type(error).__name__}: {words} (PUSHFORWARD_DEBUG=1 shows where)"


def _warn(message: Warning | str, *_: Any) -> None:
    """A warning as one line: the first of its own, and where in the source it was is of no use to a user."""
    remark(str(message).strip().partition("\n")[0])


def _check_folder() -> None:
    """Raise if this folder has been removed: a library that PyTorch loads would end the process."""
    try:
        os.getcwd()
    except OSError as error:
        raise PushforwardError(f"The current folder is not there ({error.strerror}); change to another.") from None


def _flush() -> None:
    """See that all that was printed has arrived, for Python tells of it after its end, and with a traceback."""
    try:
        sys.stdout.flush()
    except OSError as error:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - to the end
        if error.errno != errno.EPIPE:  # who reads no further knows it
            _fail(f"{error.strerror}: standard output")
        sys.exit(1)


def main() -> None:
    """Run the command line.

    Exits with 0, with 1 and one sentence on stderr where something failed, or where images came out that are none,
    with 2 for a wrong usage, with 130 for an interrupt and 143 for a request to end. `PUSHFORWARD_DEBUG=1` leaves the
    traceback of a failure.
    """

    def end(*_: object) -> NoReturn:  # what is done is kept
        raise _Ended(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed before Python began
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - to the end
    far = False

    def tell(message: Warning | str, *where: Any) -> None:
        nonlocal far
        far |= isinstance(message, FarOutside)
        _warn(message, *where)

    if os.environ.get("PUSHFORWARD_DEBUG") == "1":
        app()
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")  # names of files need not be text
    try:
        _check_folder()
        with warnings.catch_warnings():
            warnings.showwarning = tell  # type: ignore[assignment]
            app()
    except SystemExit as left:
        sys.exit(left.code or int(far))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        _fail(_said(error))
    finally:
        signal.signal(signal.SIGTERM, before)
        _flush()
