"""Samplers in words, and as many steps as a number of network evaluations allows."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pushforward.errors import PushforwardError
from pushforward.linear import VE, VP, Blurring, Flow, Gaussian, Langevin
from pushforward.maps.adaptive import AdaptiveDiffusion
from pushforward.maps.diffusion import Diffusion
from pushforward.maps.spec import SamplerSpec, parse
from pushforward.maps.storage import decoder_of, header
from pushforward.model import Model, load
from pushforward.plan import SOLVERS, exponential, save_plan
from pushforward.plan.grid import angle
from pushforward.verbs.samplers import diffusion
from support.helpers import FIELD, exact_flow, gaussian_denoiser
from support.models import SIZE, tiny


@pytest.mark.parametrize(
    "text",
    ["auto", "gddim:order=2:noise=0.5", "gddim:factor=cholesky", "ddim:eta=1:grid=karras:end=0.01",
     "ddim:parallel=preconditioned:within=0.01", "collocation:within=0.01",
     "exponential:reference=data", "rk45:tolerance=0.001"],
)  # fmt: skip
def test_words_are_the_label(text):
    assert parse(text).label == text
    assert parse(parse(text).label) == parse(text)


@pytest.mark.parametrize("solver", [name for name in SOLVERS if name != "collocation"])
@pytest.mark.parametrize("nfe", [7, 12])
def test_steps_fill_the_calls(solver, nfe):
    """No more calls than said, and one step more would make more."""
    model = tiny(VP())
    found = SamplerSpec(solver).calling(model, nfe)
    assert found.plan(model).nfe <= nfe < replace(found, steps=found.steps + 1).plan(model).nfe


@pytest.mark.parametrize("process", [Langevin(), Blurring((SIZE, SIZE))], ids=lambda p: p.name)
def test_steps_fill_the_calls_of_other_processes(process):
    model = tiny(process)
    assert SamplerSpec("heun").calling(model, 10).plan(model).nfe in (9, 10)
    assert parse("gddim:order=2:corrector=evaluate").calling(model, 10).plan(model).nfe in (9, 10)


@pytest.mark.parametrize("process", [VP(), Flow(), VE()], ids=lambda p: p.name)
@pytest.mark.parametrize("solver", ["ddim", "gddim", "dpm++"])
def test_usual_steps_lie_where_images_form(process, solver):
    """Against the exact flow of Gaussian data; equal steps in VE's time or in its root are off by .13 and more."""
    data = Gaussian(0.25)
    model = Model("gaussian", process, gaussian_denoiser(process, data), (1, *FIELD))
    there = Diffusion(model, SamplerSpec(solver).plan(model), dtype=torch.float64)
    code = there.draw(2)
    expected = exact_flow(process, data, process.t_max, 0.0, there.start(code.start.double()))
    assert float((there.decode(code) - expected).norm() / expected.norm()) <= 0.1


def test_words_reach_the_plan():
    model = tiny(VP())
    plan = parse("gddim:order=1:grid=uniform:end=0.05").plan(model)
    assert torch.equal(plan.times[[0, -1]], torch.tensor([1.0, 0.05], dtype=torch.float64))
    assert plan.settings["order"] == 1
    adaptive = parse("rk45:tolerance=0.01").diffusion(model)
    assert isinstance(adaptive, AdaptiveDiffusion)
    assert adaptive.tolerance == 0.01
    together = parse("ddim:parallel=picard:within=0.01").diffusion(model)
    assert isinstance(together, Diffusion)
    assert together.parallel is not None
    assert together.parallel.tolerance == 0.01
    assert adaptive.plan is adaptive.parallel is None
    with pytest.raises(PushforwardError, match="chooses its steps as it goes; name another"):
        parse("rk45").plan(model)


def test_adaptive_steps_follow_the_flow_under_labels():
    """To the images that many steps of the default solver lead to, from the same codes; each under its own label."""
    model = tiny(VP())
    with torch.no_grad():
        for p in model.module.parameters():
            p.add_(0.05 * torch.randn_like(p))
    adaptive, plain = (
        parse(text).diffusion(model).given(["a", "b", "b"], 2.0) for text in ("rk45:tolerance=1e-5", "auto:steps=200")
    )
    images, code = adaptive.sample(3, seed=1, batch=2), adaptive.draw(3, seed=1)
    torch.testing.assert_close(images, plain.sample(3, seed=1), rtol=0, atol=2e-2)
    torch.testing.assert_close(adaptive.some(slice(1, 3)).decode(code[1:]), images[1:], rtol=0, atol=1e-3)
    assert not torch.allclose(adaptive.given("a").decode(code[2:]), images[2:], atol=1e-3)
    with pytest.raises(PushforwardError, match="Adaptive steps have no gradient"):
        adaptive.decode(replace(code, start=code.start.requires_grad_()))
    with pytest.raises(PushforwardError, match="takes 0 noises"):
        adaptive.decode(replace(code, noises=code.start[None]))


@pytest.mark.parametrize("reference", ["data", "spectrum", "0.3"])
def test_references_by_name(reference):
    """Another reference Gaussian, other images."""
    model = tiny(VP())
    model = replace(model, reference=Gaussian(0.5), statistics=Gaussian(torch.rand(SIZE, SIZE).double() + 0.1))
    images = [Diffusion(model, parse(text).plan(model)).sample(1) for text in ("gddim", f"gddim:reference={reference}")]
    assert (images[0] - images[1]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gddim:order", "solver:name=value"),
        ("gddim:=3", "solver:name=value"),
        ("ddim:parallel=quickly", "Unknown way 'quickly'"),
        ("ddim:parallel=preconditioned:within=soon", "positive"),
        ("ddim:end=-1", "not below 0"),
        ("nothing", "Unknown solver 'nothing'; known are auto, ddim, .*, rk45"),
        ("ddim:speed=3", "no setting 'speed'"),
        ("auto:order=3:start=0.5", "chooses its own settings; leave out order and start, or"),
        ("rk45:tolerance=0", "positive"),
        ("rk45:parallel=picard", "cannot be taken at once"),
        ("gddim:reference=best", "data, spectrum or the variance"),
        ("ddim:eta=high", "takes a number as eta; got 'high'"),
        ("unipc:lower_final=no", "takes true or false as lower_final; got 'no'"),
        ("ddim:grid=coarse", "Unknown grid"),
        ("dpm++:noise=-1", "not negative; got -1"),
        ("dpm++:order=3:noise=inf", "not negative; got inf"),
        ("euler-maruyama:noise=1e300", r"not negative; got 1e\+300"),
        ("ddpm:variance=larger", "variance of small, large; got 'larger'"),
        ("gddim:factor=qr", "factor of root, cholesky; got 'qr'"),
        ("exponential:corrector=again", "corrector of reuse, evaluate; got 'again'"),
        ("exponential:variable=1", "variable of time, log-snr, angle; got 1"),
        ("ddim:steps=3:steps=4", "says steps twice"),
        ("ddim:steps=0", "1 step or more; got 0"),
        ("ddim:steps=2.5", r"1 step or more; got 2\.5"),
        ("ddim:steps=many", "1 step or more; got 'many'"),
        ("ddim:steps=4:repeats=100000000", "says repeats=100,000,000; take 100,000 at most"),
    ],
)
def test_bad_words_get_a_sentence(text, said):
    with pytest.raises(PushforwardError, match=said):
        parse(text).diffusion(tiny(VP()))


def test_a_digest_is_no_number(tmp_path):
    path = tmp_path / "own.plan"
    save_plan(SOLVERS["ddim"](VP(), angle(VP(), 3)), path)
    with pytest.raises(PushforwardError, match="not 0123456789012345"):
        parse(f"{path}:digest=0123456789012345").plan(tiny(VP()))


def test_numbers_of_other_libraries_are_numbers():
    assert parse("ddim", {"steps": np.int64(4)}).steps == 4
    assert parse("auto", {"rounds": np.int64(4)}).rounds == 4


def test_a_step_that_does_not_fit():
    with pytest.raises(PushforwardError, match="takes more than 3 network evaluations"):
        parse("rk4:end=0.01").calling(tiny(VP()), 3)


def test_the_default_sampler_is_a_solver_like_the_others():
    model = tiny(VP())
    for steps in (5, 8, 24):
        expected = Diffusion(model, SamplerSpec("auto", steps).plan(model)).sample(2)
        times = SamplerSpec("auto", steps).plan(model).times
        plan = SOLVERS["auto"](model.process, times, reference=model.reference)
        torch.testing.assert_close(Diffusion(model, plan).sample(2), expected)


@pytest.mark.parametrize("process", [VP(), Langevin(), Blurring((SIZE, SIZE))], ids=lambda p: p.name)
@pytest.mark.parametrize(
    "text", ["auto:steps=5", "auto:steps=9", "auto:steps=12", "auto:steps=8:rounds=4", "ddim:steps=4"]
)
def test_what_is_settled_makes_the_plan_again_at_its_times(process, text):
    model = tiny(process)
    spec = parse(text)
    plan = spec.plan(model)
    again = SamplerSpec(plan.solver, settings=spec.settled(plan)).at(model, plan.times.tolist())
    assert again.solver == plan.solver
    _assert_same(again, plan)


@pytest.mark.parametrize(("steps", "order"), [(5, 1), (12, 2)])
def test_guidance_lowers_the_degree_of_auto(steps, order):
    """By one, from a weight above 1; what codes say of their plan makes the same again."""
    model = tiny(VP())
    for guidance, less in ((None, 0), (0.5, 0), (1.0, 0), (2.0, 1)):
        there = diffusion(model, "auto", steps, labels=[1], guidance=guidance)
        assert there.plan.settings["order"] == order - less
        told = header("tiny", SamplerSpec("auto", steps), there, 1)
        _assert_same(decoder_of(told, model).plan, there.plan)


def test_codes_under_one_label_for_all_decode_under_it():
    """A header has a label for each code, and the weight that the map is under."""
    model = tiny(VP())
    there = diffusion(model, "ddim", 4, labels=1, guidance=2.0)
    told = header("tiny", parse("ddim:steps=4"), there, 3)
    assert (told["labels"], told["guidance"]) == ([1, 1, 1], 2.0)
    code = there.draw(3, seed=0)
    assert torch.equal(decoder_of(told, model).decode(code), there.decode(code))


def test_auto_is_nearer_to_the_flow_under_guidance_by_its_lower_degree():
    """Measured .12 against .33 on 8 images; the first four of them tell it, too."""
    model = load("fashion-vp")
    told = {"labels": [0, 1, 2, 3], "guidance": 4.0}
    code = diffusion(model, "auto", 5, **told).draw(4, seed=5)

    def error(plan):
        images = diffusion(model, plan, **told).decode(code)
        return float(((images - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)).median())

    exact = diffusion(model, "auto", 60, **told).decode(code)
    guided, unguided = (diffusion(model, "auto", 5, labels=told["labels"], guidance=g).plan for g in (4.0, 1.0))
    assert error(guided) < 0.6 * error(unguided)


@pytest.mark.parametrize("steps", [5, 12, 25])
def test_codes_of_an_earlier_rule_decode_by_it(steps):
    """Files of codes have the times of `auto`, and those of version 0.1 nothing more."""
    model = tiny(VP())
    times = angle(model.process, steps, scale=0.5, exponent=0.7)
    earlier = exponential(model.process, times, order=2, reference=model.reference, variable="angle",
                          corrector="reuse", denoise=steps <= 20)  # fmt: skip
    told = {**header("tiny", SamplerSpec(), Diffusion(model, earlier), 1), "solver": "auto", "settings": {}}
    _assert_same(decoder_of(told, model).plan, earlier)


def test_results_of_an_earlier_rule_are_known():
    assert SamplerSpec("auto").kept["rule"] == 3
    assert "rule" not in SamplerSpec("ddim").kept


def _assert_same(one, other):
    """Plans are compared by what they draw, bit for bit."""
    assert torch.equal(one.times, other.times)
    model = tiny(one.process)
    first, second = (Diffusion(model, plan).sample(2, seed=3) for plan in (one, other))
    assert torch.equal(first, second)
