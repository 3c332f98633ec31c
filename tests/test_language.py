"""Sentences that users read name their subject, and say "per" where it is meant."""

import ast
import re
from pathlib import Path

import pytest

import pushforward

SOURCE = Path(pushforward.__file__).parent
FRAGMENT = re.compile(r"^ +\w[\w, ]*: (?:likewise|of (?:the|a|an|each|all|it|them)\b.*)\.?$", re.IGNORECASE)
PER = re.compile(
    r"\b(?:answers?|calls?|evaluations?|rounds?|numbers?|nodes|one) (?:a|an) (?:step|image|frequency|row)\b"
)


def docstrings(source: str) -> list[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    return [
        ast.get_docstring(node, clean=False) or "" for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)
    ]


def faults(source: str) -> list[str]:
    lines = [line for text in docstrings(source) for line in text.splitlines()]
    return [line.strip() for line in lines if FRAGMENT.match(line)] + PER.findall(source)


PLURAL = re.compile(r"""(['"])s\1 (?:\*|if) """)
FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=[file.relative_to(SOURCE).as_posix() for file in FILES])
def test_arguments_are_said_in_whole_phrases(file: Path) -> None:
    assert faults(file.read_text(encoding="utf-8")) == []


def test_plurals_are_made_in_one_place() -> None:
    made = [file.relative_to(SOURCE).as_posix() for file in FILES if PLURAL.search(file.read_text(encoding="utf-8"))]
    assert made == ["data/words.py"]


@pytest.mark.parametrize(
    "line", ["    seed: of the codes.", "    target_prompts: likewise.", "        path: Of a file."]
)
def test_a_fragment_is_found(line: str) -> None:
    assert faults(f'def f():\n    """Do it.\n\n    Args:\n    {line}\n    """\n')
