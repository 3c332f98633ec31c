"""The front door: what `pushforward` exports, how its values look, and what can be done with a model."""

import pytest
import torch
from helpers import FIELD, PROCESSES

import pushforward as pf
from pushforward.linear import Discrete, Gaussian
from pushforward.maps.code import Code
from pushforward.model import Network
from pushforward.plan import SOLVERS
from pushforward.plan.grid import power

LINE = 200  # characters


@pytest.fixture(scope="module")
def model() -> pf.Model:
    return pf.load("fashion-vp")


# -- looks -----------------------------------------------------------------------------------------------------------


def one_line(value: object, *parts: str) -> None:
    text = repr(value)
    assert "\n" not in text
    assert len(text) < LINE, text
    for part in parts:
        assert part in text, text


@pytest.mark.parametrize("name", PROCESSES)
def test_a_process_looks_like_its_settings(name: str) -> None:
    one_line(PROCESSES[name], type(PROCESSES[name]).__name__)


def test_a_long_table_looks_short() -> None:
    betas = torch.linspace(1e-4, 0.02, 1000)
    one_line(Discrete.from_betas(betas), "1000 timesteps", "0.9999 …")


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_plan_looks_like_its_solver(solver: str) -> None:
    process = PROCESSES["vp"]
    plan = SOLVERS[solver](process, power(process, 8, end=process.t_min))
    one_line(plan, plan.solver, "process=vp", "steps=8", f"nfe={plan.nfe}", *plan.settings)


def test_a_gaussian_looks_like_its_size() -> None:
    one_line(Gaussian(0.25), "Gaussian(variance=0.25, mean=0)")
    one_line(Gaussian(torch.ones(FIELD), torch.full((1, *FIELD), 0.5)), "variance=1 over 3x2", "mean=0.5 over 1x3x2")


def test_a_model_looks_like_what_it_makes(model: pf.Model) -> None:
    one_line(model, "fashion-vp", "process=vp", "images=1x28x28", "classes=10", "parameters=2,")
    one_line(model.given(["bag", "shirt"], 2.0), "conditions=2")
    one_line(model.given(["bag", "shirt"], 2.0).denoiser, "prediction=residual", "conditions=2", "guidance=2")
    one_line(Network(lambda u, t, c: u), "prediction=epsilon")


def test_a_code_looks_like_its_parts() -> None:
    start = torch.zeros(5, 1, *FIELD)
    one_line(Code(start), "Code(5 of start 1x3x2)")
    one_line(Code(start, torch.zeros(4, *start.shape), end=start), "Code(5 of start 1x3x2, 4 noises, end)")
