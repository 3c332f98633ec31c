"""The pinned versions are those of what pyproject.toml asks for: all of it, nothing else, and within its ranges."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LINES = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
PINS = [Requirement(line) for line in LINES if line and not line.startswith("#")]


def declared() -> Iterator[Requirement]:
    """The direct dependencies of the library and its extras, but for one extra that another names."""
    lists = [PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"].values()]
    for requirement in (Requirement(line) for lines in lists for line in lines):
        if canonicalize_name(requirement.name) != "pushforward":
            yield requirement


def test_every_dependency_is_pinned_once_and_nothing_else_is():
    pinned = [canonicalize_name(pin.name) for pin in PINS]
    assert sorted(pinned) == sorted({canonicalize_name(requirement.name) for requirement in declared()})


@pytest.mark.parametrize("pin", PINS, ids=lambda pin: pin.name)
def test_a_pin_is_one_version_within_the_declared_range(pin):
    (specifier,) = pin.specifier
    assert specifier.operator == "=="
    assert "*" not in specifier.version
    ranges = [one.specifier for one in declared() if canonicalize_name(one.name) == canonicalize_name(pin.name)]
    assert all(Version(specifier.version) in one for one in ranges)


def test_every_dependency_has_a_lowest_version():
    """So that the workflow's row of lowest versions means something."""
    loose = [str(one) for one in declared() if not {"==", ">="} & {each.operator for each in one.specifier}]
    assert loose == []


def test_ruff_is_the_same_wherever_it_runs():
    (pin,) = (str(pin.specifier) for pin in PINS if pin.name == "ruff")
    assert PROJECT["tool"]["ruff"]["required-version"] == pin
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert re.findall(r"ruff-pre-commit\n\s+rev: v(\S+)", hooks) == [pin.removeprefix("==")]
