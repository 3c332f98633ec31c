"""What the documents tell a user to type exists: commands, their options, modules, names and keywords."""

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import typer

import pushforward
from pushforward.cli import app, command_names

ROOT = Path(__file__).parent.parent
ROOT_PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES = [*ROOT_PAGES, *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*.md"))]


def fences(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(text: str) -> Iterator[list[str]]:
    """The words after `pushforward` of each line that calls it, directly or through Python."""
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip().startswith(("pushforward ", "torchrun ", "accelerate ", "python ")):
            words = shlex.split(re.sub(r"\s#.*", "", line))  # in a word, `#` begins no comment: colour:#2060c0
            if "pushforward" in words:
                name, *rest = words[words.index("pushforward") + 1 :]
                two = f"{name}-{rest[0]}" if rest and name not in command_names() else ""  # a command of two words
                yield [two, *rest[1:]] if two in command_names() else [name, *rest]


def check(text: str) -> None:
    """Every command is there, and has the options."""
    for name, *words in commands(text):
        assert name in command_names()
        given = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        assert given - options(name) <= {"--help"}, f"pushforward {name} {' '.join(words)}"


@cache
def options(name: str) -> frozenset[str]:
    group = typer.main.get_command(app)
    command = group.get_command(None, name)
    return frozenset(word for option in command.params for word in [*option.opts, *option.secondary_opts])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_have_the_options_that_they_are_shown_with(page):
    check("\n".join(fences(page, "sh")))


@pytest.mark.parametrize("name", command_names())
def test_examples_in_a_commands_help_have_options_that_it_has(name):
    module = name.replace("-", "_")
    text = inspect.getdoc(getattr(importlib.import_module(f"pushforward.cli.{module}"), module))
    check(text.partition("\\b\n")[2])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_of_a_page_can_be_run_one_after_another(page):
    """A folder of results is of one command, and would refuse another's."""
    taken: dict[str, list[str]] = {}
    for words in commands("\n".join(fences(page, "sh"))):
        if words[0] in ("translate", "edit", "inpaint", "guide", "train"):
            own = words[1] if words[0] == "train" else f"the default of {words[0]}"
            place = words[words.index("--out") + 1] if "--out" in words else own
            assert taken.setdefault(place.rstrip("/"), words) == words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_training_is_shown_with_its_end(page):
    """Without one it is refused; that of an example is the default of its program."""
    for words in commands("\n".join(fences(page, "sh"))):
        assert words[0] != "train" or {"--steps", "--minutes"} & {*words}


def test_there_are_commands_to_check():
    shown = {words[0] for page in PAGES for block in fences(page, "sh") for words in commands(block)}
    assert shown >= {"sample", "guide", "translate", "inpaint"}


def resolved(node: ast.expr, names: dict[str, object]) -> object | None:
    """What a dotted name stands for, as far as it is of the package."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = resolved(node.value, names)
        if inspect.ismodule(owner) or inspect.isclass(owner):
            assert hasattr(owner, node.attr), f"{ast.unparse(node)} does not exist"
            return getattr(owner, node.attr)
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_names_and_keywords_in_python_exist(page):
    names: dict[str, object] = {"pf": pushforward}
    for node in ast.walk(ast.parse("\n".join(fences(page, "python")))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "pushforward":
            module = importlib.import_module(node.module)
            names |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Attribute):
            resolved(node, names)
        elif isinstance(node, ast.Call) and callable(function := resolved(node.func, names)):
            parameters = inspect.signature(function).parameters.values()
            if all(parameter.kind != inspect.Parameter.VAR_KEYWORD for parameter in parameters):
                known = {parameter.name for parameter in parameters}
                assert {keyword.arg for keyword in node.keywords} <= known, ast.unparse(node)


SOURCE = Path(pushforward.__file__).parent
ROOMS = sorted(path.name for path in SOURCE.iterdir() if (path / "__init__.py").is_file())
NAMED = re.compile(rf"`((?:{'|'.join(ROOMS)})\.[a-z_]+(?:\.\w+)*)`")


def test_what_docstrings_and_pages_name_is_there() -> None:
    """A dotted name in backticks that begins with a room of the package can be imported."""
    values = {"plan": pushforward.Plan, "model": pushforward.Model}  # what variables of these names are
    lost = []
    for file in [*SOURCE.rglob("*.py"), *PAGES]:
        for name in NAMED.findall(file.read_text(encoding="utf-8")):
            room, attribute, *_ = name.split(".")
            if hasattr(values.get(room), attribute) or attribute in ("json", "safetensors"):
                continue
            try:
                pkgutil.resolve_name(f"pushforward.{name}")
            except (ImportError, AttributeError):
                lost.append(f"{file.name}: {name}")
    assert lost == []


def test_commands_of_earlier_versions_are_understood() -> None:
    """What the pages and help texts of 0.1 told a user to type."""
    check((Path(__file__).parent / "fixtures" / "v0.1" / "commands.txt").read_text(encoding="utf-8"))


EXAMPLES = [file for file in sorted(SOURCE.rglob("*.py")) if ">>> " in file.read_text(encoding="utf-8")]


@pytest.mark.parametrize("file", EXAMPLES, ids=[str(file.relative_to(SOURCE)) for file in EXAMPLES])
def test_examples_in_docstrings_give_what_they_show(file: Path) -> None:
    parts = file.relative_to(SOURCE.parent).with_suffix("").parts
    result = doctest.testmod(importlib.import_module(".".join(parts).removesuffix(".__init__")))
    assert result.attempted
    assert not result.failed


def test_there_are_examples_to_check() -> None:
    shown = {file.relative_to(SOURCE).as_posix() for file in EXAMPLES}
    assert shown >= {"linear/operator.py", "linear/process.py", "plan/grid.py", "maps/code.py"}
