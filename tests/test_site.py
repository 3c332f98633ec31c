"""The documentation site: its parts are whole, without building all of it."""

import ast
import importlib
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

import pushforward
from pushforward.cli import command_names

ROOT = Path(__file__).parents[1]


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))

    def load(name: str) -> ModuleType:
        return importlib.import_module(f"site_parts.{name}")

    yield load
    for name in [name for name in sys.modules if name.split(".")[0] == "site_parts"]:
        del sys.modules[name]


def test_every_public_name_has_a_place_in_the_reference(part, tmp_path) -> None:
    part("reference").write_pages(tmp_path)
    text = "\n".join(path.read_text() for path in tmp_path.glob("*.rst"))
    named = set(re.findall(r"(?:auto\w+|data):: (?:pushforward\.)?([\w.]+)", text))
    assert {name for name in pushforward.__all__ if name not in named} <= {"energies", "grid", "solvers"}
    assert {"guidance.energies", "plan.grid", "plan.solvers"} <= named


def test_every_command_is_on_its_page(part, tmp_path) -> None:
    part("commands").write_page(tmp_path / "commands.rst")
    lines = (tmp_path / "commands.rst").read_text().splitlines()
    assert set(command_names()) <= set(lines)


def test_the_plot_of_solvers_has_what_was_measured(part) -> None:
    text = part("chooser").html(ROOT / "benchmarks" / "results")
    sets = json.loads(re.search(r'json">(.*)</script>', text)[1])
    titles = [one["title"] for one in sets]
    assert {"Langevin, exact network", "emoji, embedded network", "VP, trained on Fashion-MNIST"} <= {*titles}
    assert len(titles) == len({*titles}) == 11
    for one in sets:
        assert "auto" in {line["name"] for line in one["lines"]}
        assert all(calls > 0 and value > 0 for line in one["lines"] for calls, value, _ in line["points"])


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_scripts_stay_programs_with_a_title(part, script) -> None:
    text = part("scripts").as_cells(script.read_text(encoding="utf-8"))
    title, rule, *_ = (ast.get_docstring(ast.parse(text)) or "").splitlines()
    assert rule == "=" * len(title)
    assert "# %%\n" in text


def test_what_runs_while_the_site_is_built_is_there(part) -> None:
    assert {f"{name}.py" for name in part("scripts").ARGUMENTS} <= {p.name for p in (ROOT / "examples").glob("*.py")}


PAGES = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_links_lead_somewhere(page) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
        if "://" not in target and "/" + target.split("/")[-1].split(".")[-1] != "/" + target:
            assert (page.parent / target).exists(), target


def test_every_page_is_in_the_contents() -> None:
    contents = (ROOT / "docs" / "index.md").read_text()
    listed = set(re.findall(r"^(?:.*<)?([\w/]+)>?$", contents, re.MULTILINE))
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"} <= listed
