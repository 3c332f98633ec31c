"""The code of CONTRIBUTING.md runs, and what it adds works wherever the library's own works."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pushforward.execute import run
from pushforward.guidance.energies.parse import ENERGIES, Setting, energy
from pushforward.linear import PROCESSES as KNOWN
from pushforward.linear import VP, Gaussian, process_from_config
from pushforward.maps.code import Code
from pushforward.maps.spec import SamplerSpec
from pushforward.plan import SOLVERS, ddim, grid
from support.helpers import PROCESSES, exact_flow, gaussian_denoiser, normal, point_denoiser, times
from support.models import tiny

PAGE = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
LISTS: tuple[dict[str, Any], ...] = (SOLVERS, KNOWN, ENERGIES)


@pytest.fixture(autouse=True)
def lists_as_they_were() -> Iterator[None]:
    before = [dict(one) for one in LISTS]
    yield
    for one, kept in zip(LISTS, before, strict=True):
        one.clear()
        one.update(kept)


def add(what: str) -> dict[str, Any]:
    """Run the code of a section, and hand back the names in it."""
    section = PAGE.split(f"## Add {what}\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert len(section.splitlines()) <= 70, "longer than a page"
    names: dict[str, Any] = {"__name__": what}
    exec(compile(code, f"CONTRIBUTING.md: {what}", "exec"), names)
    return names


def test_a_solver_has_its_order_and_a_name() -> None:
    add("a solver")
    data, u = Gaussian(0.3), normal(4, 1, 4, 4)
    errors = []
    for steps in (80, 160):
        plan = SOLVERS["ab2"](VP(), grid.power(VP(), steps, start=0.9, end=0.05))
        truth = exact_flow(VP(), data, 0.9, 0.05, u)
        errors.append(float((run(plan, gaussian_denoiser(VP(), data), u) - truth).abs().max()))
    assert 3.4 < errors[0] / errors[1] < 4.6  # order 2
    images = SamplerSpec("ab2", 4, {"share": 0.5}).plan(tiny(VP()))
    assert images.nfe == 4


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_a_solver_finds_the_only_image_on_every_process(process) -> None:
    add("a solver")
    image, u = normal(1, 1, 3, 2), normal(2, process.blocks, 3, 2, seed=1)
    found = run(SOLVERS["ab2"](process, grid.uniform(process, 6)), point_denoiser(process, image), u)
    torch.testing.assert_close(process.image(found), image.expand(2, 1, 3, 2), rtol=0, atol=1e-9)


def test_a_process_is_known_by_its_name() -> None:
    process = add("a process")["SubVP"](beta_max=10.0)
    assert process_from_config(process.config()) == process
    alpha, sigma = process.alpha_sigma(times(0.3))
    torch.testing.assert_close(sigma, 1 - alpha.square(), rtol=0, atol=1e-12)
    data, u = Gaussian(0.3), normal(2, 1, 4, 4)
    found = run(ddim(process, grid.power(process, 200, start=0.9, end=0.05)), gaussian_denoiser(process, data), u)
    torch.testing.assert_close(found, exact_flow(process, data, 0.9, 0.05, u), rtol=0, atol=0.02)


def test_an_energy_is_made_of_words() -> None:
    add("an energy")
    made = energy("smooth:deviation=0.5:weight=2", Setting(read=lambda _: torch.zeros(0), shape=(1, 4, 4)))
    images = torch.zeros(2, 1, 4, 4)
    images[1, ..., 2:] = 1
    assert made(images, Code(torch.zeros(2, 1))).tolist() == pytest.approx([0, 2 * (4 / 12) / (2 * 0.25)])
