"""The frame around the commands: how they are found, how they fail, what they share."""

import inspect
import json
import math
import os
import shlex
import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path

import pytest
import typer
from PIL import Image

from pushforward import cli
from pushforward.cli._shared import models
from pushforward.cli._shared import report as reports
from pushforward.errors import PushforwardError


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["pushforward", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return left.value.code


def test_every_module_is_a_command_with_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert run(monkeypatch, "--help") == 0
    listed = capsys.readouterr().out
    for command in cli.command_names():
        assert command in listed
        name = command.replace("-", "_")
        module = import_module(f"pushforward.cli.{name}")
        assert module.__doc__
        assert callable(getattr(module, name))
        assert run(monkeypatch, command, "--help") == 0
        assert f"pushforward {command}" in capsys.readouterr().out


def test_an_unknown_command_names_those_there_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert run(monkeypatch, "sing") == 2
    assert "There is no command 'sing'" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["watermark"], ["watermark", "--help"], ["watermark", "-q", "x.png"]])
def test_the_first_word_of_two_alone_names_the_others(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert run(monkeypatch, *words) == 2
    assert "'watermark' has a second word: watermark embed or watermark read." in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--json"], ["--json", "-"]])
def test_a_report_goes_to_stdout(words, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert run(monkeypatch, "models", *words) == 0
    assert json.loads(capsys.readouterr().out)["models"]


def test_the_models_stand_in_columns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Whatever their lengths: each begins below its head, after a space."""
    assert run(monkeypatch, "models") == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert len(rows) > 1
    for place in (head.index(name) for name in head.split()[1:]):
        assert all(row[place - 1] == " " != row[place] for row in rows)


def test_the_version_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out[0].isdigit()


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (PushforwardError("There is no model 'x'; take a or b."), 1, "There is no model 'x'; take a or b."),
        (OSError(28, "No space left on device", "a.png"), 1, "No space left on device: a.png"),
        (OSError(36, "File name too long", b"\xff.png"), 1, "File name too long: \\udcff.png"),
        (
            MemoryError(),
            1,
            "There is not enough memory for this; take a smaller --batch, --count or --size. (MemoryError)",
        ),
        (KeyboardInterrupt(), 130, None),
        (
            ValueError("Overflow when unpacking long long"),  # as PyTorch has it of a number of 70 bits
            1,
            "There is not enough memory for this; take a smaller --batch, --count or --size. (Overflow when unpacking "
            "long long)",
        ),
        (ValueError("bad"), 1, "ValueError: bad (PUSHFORWARD_DEBUG=1 shows where)"),
    ],
)
def test_failures_end_in_one_sentence(
    error: BaseException,
    code: int,
    said: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    def failing() -> None:
        raise error

    monkeypatch.setattr(cli, "app", failing)
    assert run(monkeypatch) == code
    assert capsys.readouterr().err == (f"pushforward: {said}\n" if said else "")
    monkeypatch.setenv("PUSHFORWARD_DEBUG", "1")
    with pytest.raises(type(error)):
        cli.main()


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["guide", "fashion-vp", "--energy", "chi", "--out", ""], "The value of --out"),
        (["train", "model", "--data="], "The value of --data"),
        (["sample", "fashion-vp", "--prompt", "", "--json", ""], "The value of --json"),
        (["invert", "fashion-vp", ""], "An argument"),
    ],
)
def test_an_empty_path_is_not_this_folder(
    words, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """As of a variable of a script that is not set."""
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *words) == 1
    assert capsys.readouterr().err == f"pushforward: {what} is empty; write one, or leave it out.\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", cli.command_names())
def test_options_of_paths_are_known(command: str) -> None:
    """So that an empty one is refused."""
    function = getattr(import_module(f"pushforward.cli.{command.replace('-', '_')}"), command.replace("-", "_"))
    options = inspect.signature(function, eval_str=True).parameters.values()
    places = {f"--{one.name}" for one in options if "Path" in str(one.annotation) and "Option" in str(one.annotation)}
    assert places <= cli.PLACES


def test_json_reports(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    report = {"residual": math.inf, "rounds": (1, 2.5), "out": Path("grid.png"), "nested": {"ε": None}}
    plain = {"residual": None, "rounds": [1, 2.5], "out": "grid.png", "nested": {"ε": None}}
    reports.write_json(report, str(tmp_path / "report.json"))
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == plain
    reports.write_json(report, "-")
    assert json.loads(capsys.readouterr().out) == plain
    reports.write_json(report, None)
    assert capsys.readouterr().out == ""


def test_progress_goes_to_stderr_unless_quiet(capsys: pytest.CaptureFixture) -> None:
    for quiet in (False, True):
        with reports.progress("sampling", total=2, quiet=quiet) as bar:
            bar.update()
        out, err = capsys.readouterr()
        assert out == ""
        assert ("sampling" in err) is not quiet


# -- checked before the work -------------------------------------------------------------------------------------------

WORK = {  # commands, and the options that name what they write
    "sample": (["fashion-vp"], {"--out": ".png", "--animate": ".gif", "--each": "", "--json": ""}),
    "invert": (["fashion-vp", "IMAGE"], {"--out": ".safetensors", "--picture": ".png", "--json": ""}),
    "encode": (["fashion-vp", "IMAGE"], {"--out": ".safetensors", "--picture": ".png", "--json": ""}),
    "decode": (["CODES"], {"--out": ".png", "--each": "", "--json": ""}),
    "interpolate": (["CODES"], {"--out": ".png", "--save": ".safetensors", "--json": ""}),
    "translate": (["IMAGE", "--source", "fashion-vp", "--target-label", "bag"], {"--out": "", "--json": ""}),
    "edit": (["IMAGE", "--model", "emoji", "--source", "a", "--target", "b"], {"--out": "", "--json": ""}),
    "inpaint": (["fashion-vp", "IMAGE", "--mask", "IMAGE"], {"--out": "", "--json": ""}),
    "evaluate": (["fashion-vp", "--data", "IMAGES"], {"--out": "", "--json": ""}),
    "evaluate-translation": (["IMAGES", "--source", "IMAGES"], {"--out": ".txt", "--json": ""}),
    "guide": (["fashion-vp", "--energy", "chi"], {"--out": "", "--json": ""}),
    "train": (["--data", "IMAGES", "--steps", "1"], {"": "", "--json": ""}),
    "learn-plan": (["fashion-vp"], {"--out": ".plan", "--json": ""}),
    "likelihood": (["fashion-vp", "IMAGE"], {"--json": ""}),
    "plot-plan": (["fashion-vp"], {"--out": ".png", "--json": ""}),
    "watermark-embed": (["fashion-vp", "--key", "k"], {"--out": "", "--json": ""}),
    "watermark-read": (["fashion-vp", "IMAGE", "--key", "k"], {"--json": ""}),
    "models": ([], {"--json": ""}),
    "studio": ([], {}),
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, in which no model can be loaded: what is said is said before that."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    Image.new("L", (28, 28), 200).save(tmp_path / "images" / "a.png")
    (tmp_path / "file").touch()

    def work(*_: object, **__: object) -> None:
        pytest.fail("the work has begun")

    for name in ("open_model", "open_codes", "load", "load_images", "read_inputs", "_row", "_loaded"):
        for module in [import_module(f"pushforward.cli.{c.replace('-', '_')}") for c in WORK] + [models]:
            if hasattr(module, name):
                monkeypatch.setattr(module, name, work)
    return tmp_path


def words(command: str, place: Path, *more: str) -> list[str]:
    named = {"IMAGE": str(place / "images" / "a.png"), "IMAGES": str(place / "images"), "CODES": str(place / "codes")}
    return [command, *(named.get(word, word) for word in WORK[command][0]), *more]


def test_every_command_is_among_these() -> None:
    assert set(WORK) == set(cli.command_names())


@pytest.mark.parametrize(("command", "option"), [(c, o) for c, (_, options) in WORK.items() for o in options])
def test_what_cannot_be_written_is_said_before_the_work(
    command: str, option: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    end = WORK[command][1][option]
    wrong = {
        f"file/a{end}": "Not a directory",
        "n" * 256 + end: "File name too long",
        f"{'d' * 300}/a{end}": "File name too long",
        "/proc/no/such" + end: "No such file or directory",
    }
    if option == "--json":
        wrong |= {"/": "Is a directory", "/dev/full": "No space left on device"}
    for path, said in wrong.items():
        given = [*["model"] * (command == "train"), option, path] if option else [path]
        assert run(monkeypatch, *words(command, place, *given)) == 1
        message = capsys.readouterr().err
        assert message.startswith(f"pushforward: {said}: ")
        assert message.endswith(f"{path}\n")  # as the user named it
        assert message.count("\n") == 1
    assert {file.name for file in place.iterdir()} == {"images", "file"}


@pytest.mark.parametrize(
    ("command", "more", "said"),
    [
        ("sample", ["--out", "a.png", "--json", "./a.png"], "--json ./a.png is that of --out, too"),
        ("decode", ["--out", "a.png", "--each", "a.png"], "--each a.png is that of --out, too"),
        ("invert", ["--picture", "images/a.png"], "--picture images/a.png is an input, too"),
        ("interpolate", ["--save", "a.safetensors", "--json", "codes"], "--json codes is an input, too"),
        ("plot-plan", ["--out", "a.png", "--json", "a.png"], "--json a.png is that of --out, too"),
    ],
)
def test_no_result_replaces_another_or_an_input(
    command: str,
    more: list[str],
    said: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    assert run(monkeypatch, *words(command, place, *more)) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "more"),
    [
        ("invert", ["--split", "banana"]),
        ("encode", ["--split", "test"]),
        ("translate", ["--split", "train"]),
        ("edit", ["--split", "test"]),
        ("inpaint", ["--split", "test"]),
        ("evaluate", ["--split", "test"]),
        ("evaluate-translation", ["--split", "test"]),
        ("invert", ["--begin", "random"]),
        ("invert", ["--iterations", "60"]),
        ("invert", ["--clean", "--method", "naive"]),
        ("invert", ["--tolerance", "1e-4", "--method", "naive"]),
        ("invert", ["--seed", "0", "--clean"]),
        ("invert", ["--negative", "b", "--prompt", "a", "--guidance", "1"]),
        ("interpolate", ["--frames", "8", "--average"]),
        (
            "translate",
            [
                *("--negative", "c", "--source-prompt", "a", "--target-prompt", "b"),
                *("--source-guidance", "1", "--target-guidance", "1"),
            ],
        ),
        ("edit", ["--source-guidance", "2", "--method", "sdedit"]),
        ("evaluate", ["--steps", "5", "--solvers", "rk45"]),
        ("evaluate", ["--nfe", "5", "--solver", "heun:steps=3,rk45"]),
        ("guide", ["--label", "bag", "--label", "coat", "--chains", "1"]),
        ("sample", ["--label", "bag", "--label", "coat", "--count", "1"]),
        ("sample", ["--negative", "b", "--prompt", "a", "--guidance", "1"]),
        ("guide", ["--negative", "b", "--prompt", "a", "--guidance", "1"]),
    ],
)
def test_an_option_without_effect_is_said(
    command: str, more: list[str], place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert run(monkeypatch, *words(command, place, *more)) == 1
    message = capsys.readouterr().err
    assert f"pushforward: {more[0]} has no effect here: " in message
    assert message.count("\n") == 1


def test_a_path_may_begin_in_the_users_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As shells have it, which read it neither in quotes nor after `=`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for k, given in enumerate((["--json", "~/0.json"], ["--json=~/1.json"])):
        assert run(monkeypatch, "models", *given) == 0
        assert json.loads((tmp_path / f"{k}.json").read_text())["models"]
    out = ["--out", "~/plan.png"]
    assert run(monkeypatch, "plot-plan", "fashion-vp", "--solver", "ddim", "--steps", "2", *out) == 0
    assert (tmp_path / "plan.png").is_file()
    assert not (tmp_path / "~").exists()


def test_a_device_without_numbers_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    for device in ("meta", "cuda:99", "", "lazy", "x"):
        assert run(monkeypatch, "sample", "fashion-vp", "--device", device) == 1
        message = capsys.readouterr().err
        assert message.startswith(f"pushforward: Device {device!r} cannot be used here")
        assert message.count("\n") == 1


@pytest.mark.parametrize(
    "code",
    [
        "import sys; sys.exit(0)",
        "raise SystemExit",
        "def energy(images, code):\n    raise SystemExit(0)",
        "def energy(images, code):\n    raise GeneratorExit",
        "def energy(images, code):\n    return images.mean((1, 2, 3)).to('meta')",
        "def energy(images, code):\n    return images.mean((1, 2, 3)) * 1j",
    ],
)
def test_code_of_the_user_cannot_end_a_command_well(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(code, encoding="utf-8")
    words = ["--energy", "python:mine.py", "--solver", "ddim:steps=1", "--moves", "1", "--chains", "1", "--quiet"]
    assert run(monkeypatch, "guide", "fashion-vp", *words) == 1
    (message,) = capsys.readouterr().err.splitlines()
    assert ("mine.py" in message and "asks Python to exit" in message) or "must give real numbers" in message


def test_an_interrupt_in_the_work_is_said(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pushforward.cli.models._row", interrupted)
    assert run(monkeypatch, "models") == 130
    assert capsys.readouterr().err == "pushforward: interrupted\n"


def test_a_warning_is_one_line(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def warning(*_: object) -> None:
        warnings.warn("look here\nand there", stacklevel=1)
        raise PushforwardError("stop")

    monkeypatch.setattr("pushforward.cli.models._row", warning)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert run(monkeypatch, "models") == 1
    assert capsys.readouterr().err == "pushforward: look here\npushforward: stop\n"


def test_a_full_standard_output_is_said() -> None:
    command = [sys.executable, "-c", "from pushforward.cli import main; main()", "models"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (1, "pushforward: No space left on device: standard output\n")


@pytest.mark.parametrize(
    ("closed", "words", "code"), [("1", "models", 0), ("2", "models --json -", 0), ("2", "sing", 2)]
)
def test_what_is_closed_is_not_written_to(closed: str, words: str, code: int) -> None:
    command = f"{shlex.quote(sys.executable)} -c 'from pushforward.cli import main; main()' {words} {closed}>&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (code, "")


def test_a_folder_that_has_been_removed_is_said(tmp_path: Path) -> None:
    run = f"exec {shlex.quote(sys.executable)} -c 'from pushforward.cli import main; main()' models"
    words = f"cd {shlex.quote(str(tmp_path))} && mkdir gone && cd gone && rmdir ../gone && {run}"
    done = subprocess.run(["sh", "-c", words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "The current folder is not there (No such file or directory); change to another." in done.stderr
    assert done.stderr.count("\n") == 1


def test_names_that_are_no_text_are_reported(tmp_path: Path) -> None:
    reports.write_json({"out": os.fsdecode(b"\xff.png")}, str(tmp_path / "report.json"))
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == {"out": "\udcff.png"}


@pytest.mark.parametrize("command", cli.command_names())
def test_every_option_says_what_it_does_in_a_sentence(command: str) -> None:
    for option in typer.main.get_command(cli.app).get_command(None, command).params:
        text = getattr(option, "help", None)
        if option.name != "help":
            assert text, option.name
            assert not text.startswith("Of "), option.name
            assert text[0].isupper(), option.name
            assert text.endswith("."), option.name
