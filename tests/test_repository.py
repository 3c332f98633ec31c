"""What the files at the root and the workflows say is so."""

import pkgutil
import re
import tomllib
from pathlib import Path

import pytest

import pushforward

ROOT = Path(__file__).parent.parent
CHANGES = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
ROWS = [line.strip("|").split("|") for line in CHANGES.splitlines() if line.startswith("| `")]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("now", [now for _, now in ROWS], ids=[before.strip(" `") for before, _ in ROWS])
def test_what_has_moved_is_where_the_changelog_says(now):
    places = re.findall(r"`([\w.]+)`", now)
    assert places
    for place in places:
        assert pkgutil.resolve_name(place) is not None


def test_the_version_is_the_same_everywhere():
    assert f"## [{VERSION}]" in CHANGES
    assert (
        re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)[1] == VERSION
    )


def test_contributing_names_every_room():
    rooms = {path.parent.name for path in Path(pushforward.__file__).parent.glob("*/__init__.py")}
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert {room for room in rooms if f"`{room}`" not in text} == set()


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_to_a_commit(workflow):
    """By its whole hash: a tag can be moved. The tag stands beside it, to read."""
    used = re.findall(r"uses: (.*)", workflow.read_text(encoding="utf-8"))
    assert used
    assert [one for one in used if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v[\d.]+", one)] == []


def test_there_are_workflows_for_tests_and_releases():
    assert {path.stem for path in WORKFLOWS} >= {"tests", "release"}
