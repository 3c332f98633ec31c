"""Our plans in pipelines of `diffusers`: against our executor, and against `diffusers`' schedulers.

Networks have random weights. In float64 our executor and a pipeline do the same arithmetic, but for the order of some
sums: 1e-9. `diffusers`' schedulers have float32 tables, which differ by 1e-5 of their value: 1e-4 of the largest value.
"""

import copy
import runpy
from collections.abc import Callable, Iterator
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.training_utils import compute_snr
from PIL import Image
from torch import Tensor

import pushforward as pf
from pushforward.execute import run
from pushforward.execute.density import Path as Walked
from pushforward.execute.density import log_densities
from pushforward.integrations.diffusers import PushforwardScheduler
from pushforward.linear import Gaussian
from pushforward.maps.spec import SamplerSpec
from pushforward.model import Model, Network
from pushforward.model.diffusers.schedules import read_schedule
from pushforward.plan import SOLVERS, ddim, plan_of
from support.helpers import FIELD, assert_close
from support.pipelines import flux, stable_diffusion_3, stable_diffusion_xl

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),  # of diffusers
]

EXACT, SINGLE = 1e-9, 1e-4
STEPS = 5
EXPLICIT = ["auto", *(name for name in SOLVERS if name not in ("collocation", "sscs"))]
CONFIGS: dict[str, Any] = {
    "epsilon": diffusers.DDIMScheduler(clip_sample=False),
    "clipped": diffusers.DDPMScheduler(clip_sample_range=0.8, timestep_spacing="trailing"),
    "v": diffusers.PNDMScheduler(prediction_type="v_prediction", steps_offset=1),
    "sample": diffusers.UniPCMultistepScheduler(prediction_type="sample"),
    "euler": diffusers.EulerDiscreteScheduler(timestep_spacing="leading"),
    "edm": diffusers.EDMEulerScheduler(),
    "flow": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "unipc-flow": diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=2.0
    ),
}
UNET: dict[str, Any] = {
    "sample_size": 8, "in_channels": 2, "out_channels": 2, "block_out_channels": (4, 8), "layers_per_block": 1,
    "norm_num_groups": 2, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 4,
}  # fmt: skip


def toy(u: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
    """Some network: neither linear nor the same at all times."""
    t = torch.as_tensor(t).to(u.dtype).reshape(-1, *[1] * (u.ndim - 1))
    return torch.tanh(u + 0.3 * torch.sin(t / 200)) * (0.4 + 0.1 * torch.cos(t / 90))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(source: torch.Generator, count: int = 2) -> Tensor:
    return torch.randn(count, 3, *FIELD, dtype=torch.float64, generator=source)


def loop(
    scheduler: Any, start: Tensor, network: Callable[..., Tensor] = toy, timesteps: Tensor | None = None, **more: Any
) -> Tensor:
    """What pipelines do."""
    for t in scheduler.timesteps if timesteps is None else timesteps:
        seen = scheduler.scale_model_input(start, t) if hasattr(scheduler, "scale_model_input") else start
        start = scheduler.step(network(seen, t), t, start, return_dict=False, **more)[0]
    return start


def model_of(scheduler: Any, network: Callable[..., Tensor] = toy, variance: float = 1.0) -> Model:
    """What is read from a scheduler, around a network, for our executor; told times as pipelines are: of float32."""
    schedule = read_schedule({**scheduler.config, "_class_name": type(scheduler).__name__}, Path("file"))
    denoiser = Network(lambda u, t, c: schedule.gain * network(u, t.float()), **schedule.network)
    reference = schedule.reference or Gaussian(variance)
    return Model("toy", schedule.process, denoiser, (3, *FIELD), reference, grid=schedule.grid)


# -- our executor -----------------------------------------------------------------------------------------------------


PAIRS = [(name, solver) for name in ("epsilon", "edm", "flow") for solver in EXPLICIT]
PAIRS += [(name, solver) for name in CONFIGS for solver in ("auto", "heun", "ddpm") if (name, solver) not in PAIRS]


@pytest.mark.parametrize(("name", "solver"), PAIRS)
def test_loops_are_our_executor(name: str, solver: str) -> None:
    """Every explicit solver on every process, also with its noise, where the pipeline's own scheduler has its steps."""
    same_as_ours(name, solver)


@pytest.mark.parametrize("solver", ["ddpm", "gddim", "kutta3"])
def test_grids_are_chosen_by_name(solver: str) -> None:
    found = same_as_ours("flow", solver, grid="angle")
    assert (found - same_as_ours("flow", solver)).abs().max() > 1e-3


def same_as_ours(name: str, solver: str, grid: str | None = None) -> Tensor:
    theirs = CONFIGS[name]
    model = model_of(theirs)
    if (name, solver) == ("flow", "euler-maruyama"):
        with pytest.raises(pf.PushforwardError, match="start the grid below"):  # as our executor says
            PushforwardScheduler.from_config(theirs.config, solver=solver)
        return torch.empty(0)
    scheduler = PushforwardScheduler.from_config(theirs.config, solver=solver, grid=grid)
    scheduler.set_timesteps(STEPS)
    plan = SamplerSpec(solver, STEPS, grid=grid).plan(model, guided=True)
    assert len(scheduler.timesteps) == plan.nfe
    start, noise = draw(generator(1)) * scheduler.init_noise_sigma, generator(2)
    found = loop(scheduler, start, generator=generator(2))
    assert_close(found, run(plan, model.denoiser, start, noise=lambda _: draw(noise)), EXACT)
    return found


@pytest.mark.parametrize(
    ("solver", "settings"),
    [
        ("gddim", {"order": 0}),
        ("gddim", {"order": 2, "corrector": "evaluate"}),
        ("ddim", {"eta": 0.7}),
        ("dpm++", {"order": 1, "noise": 1.0}),
        ("exponential", {"reference": "data", "variable": "angle"}),
        ("exponential", {"reference": 0.3, "corrector": "reuse"}),
    ],
    ids=str,
)
def test_settings_reach_the_solver(solver: str, settings: dict[str, Any]) -> None:
    theirs = CONFIGS["v"]
    model = model_of(theirs, variance=0.25)
    scheduler = PushforwardScheduler.from_config(theirs.config, solver=solver, variance=0.25, **settings)
    scheduler.set_timesteps(STEPS)
    noise = generator(2)
    plan = SamplerSpec(solver, STEPS, settings).plan(model, guided=True)
    expected = run(plan, model.denoiser, draw(generator(1)), noise=lambda _: draw(noise))
    found = loop(scheduler, draw(generator(1)), generator=generator(2))
    assert_close(found, expected, EXACT)
    plain = loop(PushforwardScheduler(theirs, "ddim"), draw(generator(1)))  # 10 steps, as it comes
    assert (found - plain).abs().max() > 1e-3


@pytest.mark.parametrize("solver", EXPLICIT)
def test_loops_begin_in_the_middle(solver: str) -> None:
    """As image to image: the plan on the rest of the grid, by `set_begin_index` or by the timestep alone."""
    theirs, index = CONFIGS["epsilon"], 2
    model = model_of(theirs)
    scheduler = PushforwardScheduler.from_config(theirs.config, solver=solver)
    scheduler.set_timesteps(STEPS)
    whole = SamplerSpec(solver, STEPS).plan(model, guided=True)
    named = {"auto": "exponential"}.get(solver, solver)
    more = {**whole.settings, "reference": 1.0} if solver == "auto" else {}
    plan = plan_of(model.process, named, whole.times[index:], more)
    rest = scheduler.timesteps[index * scheduler.order :]
    assert len(rest) == plan.nfe
    noise = generator(2)
    expected = run(plan, model.denoiser, draw(generator(1)), noise=lambda _: draw(noise))
    for given in (False, True):
        if given:
            scheduler.set_timesteps(STEPS)
            scheduler.set_begin_index(index * scheduler.order)
        assert_close(loop(scheduler, draw(generator(1)), timesteps=rest, generator=generator(2)), expected, EXACT)


def test_a_chain_in_two_parts_is_the_chain() -> None:
    """As a base model and a refiner share it; DDIM has no past that the second could miss.

    EDM's network is scaled by a timestep in float32 where the second begins: 1e-7 of the value.
    """
    for name in ("euler", "flow", "edm"):
        whole, second = (PushforwardScheduler.from_config(CONFIGS[name].config, solver="ddim") for _ in range(2))
        whole.set_timesteps(STEPS)
        second.set_timesteps(STEPS)
        second.set_begin_index(2)
        start = draw(generator()) * whole.init_noise_sigma
        halfway = loop(whole, start, timesteps=whole.timesteps[:2])
        whole.set_timesteps(STEPS)
        assert_close(loop(second, halfway, timesteps=second.timesteps[2:]), loop(whole, start), 1e-7)


BEGUN = {
    **{name: CONFIGS[name] for name in ("epsilon", "edm", "flow")},
    "no signal": diffusers.DDIMScheduler(
        rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction", clip_sample=False
    ),
    "ends above 0": diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    "ends twice": diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False),
}


@pytest.mark.parametrize("name", BEGUN)
@pytest.mark.parametrize("solver", ["ddim", "heun", "midpoint", "kutta3"])
def test_steps_begin_where_pipelines_reckon(solver: str, name: str) -> None:
    """At a step's number times `order`, from every step on: methods of one step have no past, so parts are the whole.

    They begin there also by the timestep alone. Where `sigmas` are given, pipelines take every call for a step.
    """
    scheduler = PushforwardScheduler(BEGUN[name], solver)

    def prepare(given: bool) -> None:
        scheduler.set_timesteps(**({"sigmas": [1.0, 0.8, 0.5, 0.3]} if given else {"num_inference_steps": 4}))

    for given in (False, True)[: 1 + (name == "flow")]:
        prepare(given)
        assert scheduler.num_inference_steps == 4
        calls = scheduler.timesteps
        start = draw(generator()) * scheduler.init_noise_sigma
        whole = loop(scheduler, start)
        for step in range(len(calls) if given else 4):
            index = step * scheduler.order
            assert given or index >= step
            halfway = start
            if index:
                prepare(given)
                halfway = loop(scheduler, start, timesteps=calls[:index])
            for told in (False, True):
                prepare(given)
                if told:
                    scheduler.set_begin_index(index)
                assert_close(loop(scheduler, halfway, timesteps=calls[index:]), whole, 1e-7)  # EDM's float32 timestep


@pytest.mark.parametrize("solver", ["heun", "auto", "kutta3"])
def test_gaussian_images_keep_their_deviation_from_every_step_on(solver: str) -> None:
    """The exact network of data N(0, .25) takes states of the right deviation to images of deviation .5.

    With 20 steps the error of these methods is below 3%; half a step too much or too little noise would be 5%.
    """
    scheduler = PushforwardScheduler(CONFIGS["flow"], solver, variance=0.25)

    def exact(u: Tensor, t: Tensor) -> Tensor:
        time = t.double() / 1000
        image = 0.25 * (1 - time) * u / (0.25 * (1 - time) ** 2 + time**2)
        return (u - image) / time

    scheduler.set_timesteps(20)
    for step in (0, 1, 7, 15):
        scheduler.set_timesteps(20)
        index = step * scheduler.order
        scheduler.set_begin_index(index)
        t = scheduler.timesteps[index].double() / 1000
        start = draw(generator(3)) * (0.25 * (1 - t) ** 2 + t**2).sqrt()
        found = loop(scheduler, start, exact, timesteps=scheduler.timesteps[index:])
        assert_close(found, 0.5 * draw(generator(3)), 0.03)


def test_states_that_the_loop_changes_are_the_plans() -> None:
    """As inpainting does: what is put in the place of a state counts, and a multistep solver keeps its past."""
    theirs = CONFIGS["sample"]
    scheduler = PushforwardScheduler(theirs, "ddim")
    scheduler.set_timesteps(2)
    first, second = scheduler.timesteps
    halfway = scheduler.step(toy(draw(generator()), first), first, draw(generator())).prev_sample + 0.5
    found = scheduler.step(toy(halfway, second), second, halfway)
    model = model_of(theirs)
    plan = ddim(model.process, SamplerSpec("ddim", 2).plan(model).times[1:])
    assert_close(found.prev_sample, run(plan, model.denoiser, halfway), EXACT)
    assert_close(found.pred_original_sample, toy(halfway, second), EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_goes_in_and_out(dtype: torch.dtype) -> None:
    """Four roundings of states and outputs of size 1, a few times larger by the end: 20 of the dtype's."""
    scheduler = PushforwardScheduler(CONFIGS["v"], "dpm++")
    scheduler.set_timesteps(4)
    expected = loop(scheduler, draw(generator()))
    found = loop(scheduler, draw(generator()).to(dtype), lambda u, t: toy(u.double(), t).to(dtype))
    assert found.dtype == dtype
    assert_close(found.double(), expected, 20 * torch.finfo(dtype).eps)


def test_a_second_run_needs_no_preparation_and_channels_of_variance_are_left_aside() -> None:
    scheduler = PushforwardScheduler(CONFIGS["epsilon"], "gddim")
    scheduler.set_timesteps(STEPS)
    first = loop(scheduler, draw(generator()))
    again = loop(scheduler, draw(generator()), lambda u, t: torch.cat([toy(u, t), u], 1))
    assert torch.equal(first, again)


# -- diffusers' schedulers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize(
    "settings", [{}, {"prediction_type": "v_prediction"}, {"set_alpha_to_one": False, "steps_offset": 1}], ids=str
)
def test_ddim_is_theirs(settings: dict[str, Any], eta: float) -> None:
    """Also its noise from the generator: both draw once a step, theirs once more at the end."""
    theirs = diffusers.DDIMScheduler(clip_sample=False, **settings)
    ours = PushforwardScheduler.from_config(theirs.config, solver="ddim", eta=eta)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(STEPS)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert ours.timesteps.dtype == theirs.timesteps.dtype
    steps = [loop(s, draw(generator(1)), eta=eta, generator=generator(2)) for s in (ours, theirs)]
    assert_close(*steps, SINGLE)


@pytest.mark.parametrize("kind", ["CogVideoXDDIM", "CogVideoXDPM"])
def test_a_table_with_another_ratio_of_signal_to_noise(kind: str) -> None:
    """CogVideoX's and CogView3's, which do not clip, whatever they say; the steps are DDIM's."""
    settings = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    theirs = diffusers.CogVideoXDDIMScheduler(**settings)
    scheduler = getattr(diffusers, f"{kind}Scheduler")(**settings)
    ours = PushforwardScheduler.from_config(scheduler.config, solver="ddim")
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(STEPS)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert_close(*(loop(s, draw(generator(1))) for s in (ours, theirs)), SINGLE)


@pytest.mark.parametrize("clipped", [None, False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"clip_sample_range": 0.5},
        {"prediction_type": "v_prediction", "set_alpha_to_one": False, "clip_sample_range": 0.2},  # its last step clips
        {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.5},
    ],
    ids=str,
)
def test_ddim_bounds_the_image_as_theirs(settings: dict[str, Any], clipped: bool | None) -> None:
    """The noise stays as the network said, or is what fits the bounded image where the pipeline says so."""
    theirs = diffusers.DDIMScheduler(**settings)
    ours = PushforwardScheduler.from_config(theirs.config, solver="ddim")
    ends = []
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(STEPS)
        ends.append(loop(scheduler, draw(generator(1)), use_clipped_model_output=clipped))
    assert len(ours.timesteps) == STEPS
    assert_close(*ends, SINGLE)
    unbounded = diffusers.DDIMScheduler.from_config(theirs.config, clip_sample=False, thresholding=False)
    unbounded.set_timesteps(STEPS)
    assert (loop(unbounded, draw(generator(1))) - ends[1]).abs().max() > 0.01


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_a_last_step_that_moves_nothing_is_a_step(spacing: str) -> None:
    """At timestep 0 already, where such a grid ends: the pipeline's steps are as many as it asked for, as theirs."""
    theirs = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, timestep_spacing=spacing)
    for solver in ("ddim", "heun", "auto"):
        ours = PushforwardScheduler(theirs, solver)
        ours.set_timesteps(4)
        theirs.set_timesteps(4)
        assert ours.num_inference_steps == 4
        assert len(ours.timesteps) >= 4
        if solver == "ddim":
            assert torch.equal(ours.timesteps, theirs.timesteps)
            if spacing != "linspace":  # where their step goes on to a timestep that is not the next of the list
                assert_close(loop(ours, draw(generator())), loop(theirs, draw(generator())), SINGLE)
    ours = PushforwardScheduler(theirs, "ddim")
    ours.set_timesteps(timesteps=[900, 400, 0])
    assert ours.timesteps.tolist() == [900, 400, 0]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize(
    ("name", "solver", "settings"),
    [
        ("DDIMScheduler", "ddim", {"set_alpha_to_one": False, "clip_sample": False}),
        ("DDIMScheduler", "ddim", {"set_alpha_to_one": False}),
        ("UniPCMultistepScheduler", "unipc", {"final_sigmas_type": "sigma_min", "use_karras_sigmas": True}),
        ("DPMSolverMultistepScheduler", "dpm++", {"final_sigmas_type": "sigma_min", "use_karras_sigmas": True}),
    ],
)
def test_a_last_step_that_stays_where_it_begins(name: str, solver: str, settings: dict[str, Any], count: int) -> None:
    """The step before it is no last one to them: of full order, and UniPC corrects it. One step alone stays, too."""
    theirs = getattr(diffusers, name)(**settings)
    ours = PushforwardScheduler(theirs, solver)
    ends = []
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(count)
        ends.append(loop(scheduler, draw(generator()), lambda u, _: toy(u, 500)))  # they round levels' timesteps
    torch.testing.assert_close(ours.timesteps.double(), theirs.timesteps.double(), rtol=0, atol=0.5)
    assert_close(*ends, SINGLE)


@pytest.mark.parametrize("name", ["euler", "flow", "edm"])
def test_eulers_method_is_theirs(name: str) -> None:
    """Their Euler step is DDIM's in other units: with scaled states, and with EDM's scaled input and output."""
    theirs = copy.deepcopy(CONFIGS[name])
    ours = PushforwardScheduler.from_config(theirs.config, solver="ddim")
    ends = []
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(STEPS)
        ends.append(loop(scheduler, draw(generator()).float() * getattr(scheduler, "init_noise_sigma", 1.0)))
    torch.testing.assert_close(ours.timesteps.double(), theirs.timesteps.double(), rtol=1e-5, atol=1e-5)
    if name == "edm":  # they begin with noise for data of deviation 1; ours is for sigma_data
        ours.set_timesteps(STEPS)
        ends[1] = loop(ours, draw(generator()).float() * theirs.init_noise_sigma)
    assert_close(ends[1], ends[0], SINGLE)


@pytest.mark.parametrize("shift_type", ["exponential", "linear"])
@pytest.mark.parametrize("given", [False, True], ids=["steps", "sigmas"])
def test_grids_of_flow_models_are_shifted_as_theirs(given: bool, shift_type: str) -> None:
    for terminal in (None, 0.1):
        settings = {"use_dynamic_shifting": True, "shift_terminal": terminal, "time_shift_type": shift_type}
        theirs = diffusers.FlowMatchEulerDiscreteScheduler(**settings)
        ours = PushforwardScheduler(theirs, "ddim")
        sigmas = {"sigmas": [1.0, 0.7, 0.3]} if given else {"num_inference_steps": 3}
        for scheduler in (theirs, ours):
            scheduler.set_timesteps(**sigmas, mu=0.8)
        torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=1e-5, atol=1e-6)


def test_a_fixed_shift_and_a_terminal_are_theirs() -> None:
    """With one step, where they divide 0 by 0, it begins at the noise."""
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, shift_terminal=0.1)
    ours = PushforwardScheduler(theirs, "ddim")
    for count in (2, 4):
        theirs.set_timesteps(count)
        ours.set_timesteps(count)
        torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-5, atol=1e-6)
    ours.set_timesteps(1)
    assert ours.sigmas.tolist() == [1, 0]


@pytest.mark.parametrize("settings", [{"use_dynamic_shifting": True, "time_shift_type": "linear"}, {"shift": 2.0}])
def test_timesteps_and_sigmas_go_together(settings: dict[str, Any]) -> None:
    """As CogView4 gives both: states are at the shifted sigmas, and the network is told the timesteps."""
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(**settings)
    ours = PushforwardScheduler(theirs, "ddim")
    timesteps = [1000.0, 667.0, 334.0, 1.0]
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(timesteps=timesteps, sigmas=[t / 1000 for t in timesteps], mu=1.3)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-5, atol=1e-6)
    image, noise = draw(generator(1), 1), draw(generator(2), 1)
    begun = [s.scale_noise(image, theirs.timesteps[1:2], noise) for s in (ours, theirs)]
    assert_close(*begun, SINGLE)
    assert_close(loop(ours, draw(generator())), loop(theirs, draw(generator())), SINGLE)
    heun = PushforwardScheduler(theirs, "heun")
    heun.set_timesteps(4, timesteps=timesteps, sigmas=[t / 1000 for t in timesteps], mu=1.3)
    assert heun.timesteps.tolist() == [1000, 667, 334, 334, 1, 1][: len(heun.timesteps)]


def test_the_last_of_the_sigmas_is_the_end_as_theirs() -> None:
    """For tables. Those published for Stable Diffusion have three digits, and so lie just outside its range."""
    theirs = copy.deepcopy(CONFIGS["euler"])
    ours = PushforwardScheduler(theirs, "ddim")
    for sigmas in ([100.0, 3.0, 0.5, 0.0], [100.0, 3.0, 0.5], [157.5, 1.0, 0.00995]):
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(sigmas=sigmas)
        assert len(ours.timesteps) == ours.num_inference_steps == theirs.num_inference_steps
        torch.testing.assert_close(ours.timesteps.double(), theirs.timesteps.double(), rtol=1e-3, atol=0.1)
    auto = PushforwardScheduler(theirs, "auto")
    auto.set_timesteps(sigmas=[100.0, 3.0, 0.5, 0.0])
    assert len(auto.timesteps) == 3


def test_timesteps_and_sigmas_of_the_pipeline_are_the_grid() -> None:
    ours = PushforwardScheduler(CONFIGS["euler"], "heun")
    ours.set_timesteps(timesteps=[900, 500, 100])
    assert ours.timesteps.tolist() == [900, 500, 500, 100, 100]  # the last step has to go to clean data at once
    theirs = copy.deepcopy(CONFIGS["euler"])
    theirs.set_timesteps(3)
    ours.set_timesteps(sigmas=theirs.sigmas.tolist())
    torch.testing.assert_close(ours.timesteps[::2].double(), theirs.timesteps.double(), rtol=1e-4, atol=1e-2)
    named = PushforwardScheduler(CONFIGS["flow"], "ddim", grid="angle")
    named.set_timesteps(3)
    before = named.timesteps
    named.set_timesteps(sigmas=[1.0, 0.9, 0.8])
    assert torch.equal(named.timesteps, before)  # a grid that has a name is kept


@pytest.mark.parametrize("name", ["epsilon", "flow"])
def test_noise_is_added_as_theirs(name: str) -> None:
    theirs = copy.deepcopy(CONFIGS[name])
    ours = PushforwardScheduler(theirs, "ddim")
    image, noise = draw(generator(1)), draw(generator(2))
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(STEPS)
    add = (
        ("scale_noise", image, theirs.timesteps[1:3], noise)
        if name == "flow"
        else ("add_noise", image, noise, [7, 700])
    )
    values = [torch.as_tensor(v) if isinstance(v, list) else v for v in add[1:]]
    expected = getattr(theirs, add[0])(*values)
    assert_close(getattr(ours, add[0])(*values), expected, SINGLE)


@pytest.mark.parametrize(
    "settings",
    [{}, {"beta_schedule": "scaled_linear", "set_alpha_to_one": False}, {"rescale_betas_zero_snr": True}],
    ids=str,
)
def test_training_loops_find_the_table(settings: dict[str, Any]) -> None:
    """Theirs is a product in float32: 1e-4 of it, and of the signal where that is least."""
    theirs = diffusers.DDIMScheduler(**settings)
    ours = PushforwardScheduler(theirs, "heun")
    for name in ("alphas_cumprod", "alphas", "betas", "final_alpha_cumprod"):
        found, expected = getattr(ours, name), getattr(theirs, name)
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    image, noise, times = draw(generator(1)), draw(generator(2)), torch.tensor([3, 990])
    for name in ("add_noise", "get_velocity"):
        assert_close(getattr(ours, name)(image, noise, times), getattr(theirs, name)(image, noise, times), SINGLE)
    torch.testing.assert_close(compute_snr(ours, times), compute_snr(theirs, times), rtol=1e-3, atol=1e-6)
    flow = PushforwardScheduler(CONFIGS["flow"], "ddim")
    assert not hasattr(flow, "alphas_cumprod")
    assert torch.equal(flow.get_velocity(image, noise, times), noise - image)


# -- pipelines --------------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """Runs a pipeline and gives its last state, before it is clipped to an image."""

    def use(pipe: Any, **settings: Any) -> Tensor:
        states: list[Tensor] = []
        step = pipe.scheduler.step

        def kept(*args: Any, **more: Any) -> Any:
            result = step(*args, **more)
            states.append(result[0])
            return result

        monkeypatch.setattr(pipe.scheduler, "step", kept)
        pipe.set_progress_bar_config(disable=True)
        pipe(num_inference_steps=STEPS, **settings)
        return states[-1]

    return use


@pytest.mark.parametrize("solver", ["auto", "gddim", "ddpm"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_unconditional_pipelines(prediction: str, solver: str, finished: Callable[..., Tensor], tmp_path: Path) -> None:
    """Against the same folder read by `load`, from the same noise; in float64."""
    torch.manual_seed(1)
    unet = diffusers.UNet2DModel(**UNET).double().eval()
    pipe = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(prediction_type=prediction, clip_sample=False))
    pipe.save_pretrained(tmp_path)
    model = pf.load(tmp_path, dtype=torch.float64)
    grid = None if solver == "auto" else "angle"
    pipe.scheduler = PushforwardScheduler.from_config(pipe.scheduler.config, solver=solver, grid=grid, variance=0.25)
    found = finished(pipe, batch_size=2, generator=generator(3), output_type="pt")
    noise = generator(3)
    normals = [torch.randn(2, 2, 8, 8, dtype=torch.float64, generator=noise) for _ in range(STEPS + 1)]
    plan = SamplerSpec(solver, STEPS, grid=grid).plan(model, guided=True)
    assert_close(found, run(plan, model.denoiser, normals[0], noise=lambda k: normals[k]), EXACT)


def text_pipeline(kind: type, **scheduler: Any) -> Any:
    """Stable Diffusion, tiny and random, for prompts that are encoded already."""
    torch.manual_seed(1)
    unet = diffusers.UNet2DConditionModel(
        sample_size=4, in_channels=4, out_channels=4, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8, attention_head_dim=4,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(block_out_channels=(4, 4), latent_channels=4, norm_num_groups=2,
                                  down_block_types=("DownEncoderBlock2D",) * 2,
                                  up_block_types=("UpDecoderBlock2D",) * 2)  # fmt: skip
    table = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    ddim = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **table, **scheduler)
    parts = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipe = kind(vae=vae, unet=unet, scheduler=ddim, requires_safety_checker=False, **parts)
    pipe.unet.eval().requires_grad_(False)
    pipe.vae.eval().requires_grad_(False)
    return pipe


PROMPT = {
    "prompt_embeds": torch.randn(1, 3, 8, generator=generator(7)),
    "negative_prompt_embeds": torch.randn(1, 3, 8, generator=generator(8)),
}


def guided(pipe: Any, weight: float) -> Callable[..., Tensor]:
    """The network of Stable Diffusion under a prompt and guidance, by itself."""

    def network(u: Tensor, t: Tensor) -> Tensor:
        nothing, told = (pipe.unet(u, t, PROMPT[k].expand(len(u), -1, -1)).sample for k in reversed(PROMPT))
        return nothing + weight * (told - nothing)

    return network


@pytest.mark.parametrize(
    ("prediction", "solver"),
    [
        ("epsilon", "ddim"),
        ("epsilon", "unipc"),
        ("epsilon", "heun"),
        ("v_prediction", "ddim"),
        ("v_prediction", "auto"),
    ],
)
def test_text_pipelines_with_guidance(prediction: str, solver: str) -> None:
    """In float32, where the batch of two that guidance makes rounds otherwise than two batches: 1e-5 of the value."""
    pipe = text_pipeline(diffusers.StableDiffusionPipeline, prediction_type=prediction)
    pipe.set_progress_bar_config(disable=True)
    model = model_of(pipe.scheduler, guided(pipe, 3.0))
    use = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "latent", **PROMPT}
    start = torch.randn(1, 4, 4, 4, generator=generator())
    theirs = pipe(**use, latents=start).images
    pipe.scheduler = PushforwardScheduler.from_config(pipe.scheduler.config, solver=solver)
    found = pipe(**use, latents=start).images
    assert_close(found, run(SamplerSpec(solver, STEPS).plan(model, guided=True), model.denoiser, start), 1e-5)
    if solver == "ddim":
        assert_close(found, theirs, SINGLE)
    else:
        assert (found - theirs).abs().max() > 10 * SINGLE


@pytest.mark.parametrize("solver", ["ddim", "auto", "heun", "ddpm"])
def test_image_to_image(solver: str) -> None:
    """Strength .6 of five steps is three, from the image with the noise of the third time; float32 as above."""
    pipe = text_pipeline(diffusers.StableDiffusionImg2ImgPipeline)
    pipe.set_progress_bar_config(disable=True)
    own = pipe.scheduler
    model = model_of(own, guided(pipe, 2.0))
    image = torch.rand(1, 3, 8, 8, generator=generator(4))
    seen: list[Tensor] = []
    pipe.unet.register_forward_pre_hook(lambda _, args: seen.append(args[0]))

    def use(source: torch.Generator) -> Tensor:
        seen.clear()
        return pipe(image=image, strength=0.6, num_inference_steps=STEPS, guidance_scale=2.0, output_type="latent",
                    generator=source, **PROMPT).images  # fmt: skip

    theirs = use(generator(5))
    pipe.scheduler = PushforwardScheduler.from_config(own.config, solver=solver)
    found, start = use(generator(5)), seen[0][:1]
    assert len(seen) == {"heun": 6}.get(solver, 3)  # this table's last step ends above time 0, so has both calls
    whole = SamplerSpec(solver, STEPS).plan(model, guided=True)
    named, more = (solver, {}) if solver != "auto" else ("exponential", {**whole.settings, "reference": 1.0})
    plan = plan_of(model.process, named, whole.times[2:], more)
    noise = generator(5)
    torch.randn(2, 1, 4, 4, 4, generator=noise)  # of the encoder, and on the image
    expected = run(plan, model.denoiser, start, noise=lambda _: torch.randn(1, 4, 4, 4, generator=noise))
    assert_close(found, expected, 1e-5)
    if solver == "ddim":
        assert_close(found, theirs, SINGLE)


def test_a_batch_is_its_images_one_by_one() -> None:
    """With noise: each image has its generator. Batches round otherwise than single images: 1e-5."""
    pipe = text_pipeline(diffusers.StableDiffusionPipeline)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = PushforwardScheduler.from_config(pipe.scheduler.config, solver="dpm++", noise=1.0)
    embeds = {name: torch.cat([value, 0.5 * value]) for name, value in PROMPT.items()}

    def draw(rows: slice) -> Tensor:
        some = {name: value[rows] for name, value in embeds.items()}
        sources = [generator(k) for k in range(2)[rows]]
        return pipe(num_inference_steps=STEPS, output_type="latent", generator=sources, **some).images

    together = draw(slice(0, 2))
    apart = torch.cat([draw(slice(k, k + 1)) for k in range(2)])
    assert_close(together, apart, 1e-5)
    assert (together[0] - together[1]).abs().max() > 0.1


@pytest.mark.parametrize(("solver", "grid"), [("ddim", None), ("heun", "angle"), ("auto", None)])
def test_flow_pipelines(solver: str, grid: str | None) -> None:
    """Flux says its own sigmas, shifted by the size of the image; its states are sequences."""
    torch.manual_seed(1)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8), guidance_embeds=False,
    ).eval().requires_grad_(False)  # fmt: skip
    own = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    parts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae"))
    pipe = diffusers.FluxPipeline(transformer=transformer, scheduler=own, **parts)
    pipe.set_progress_bar_config(disable=True)
    prompt, pooled = torch.randn(1, 3, 8, generator=generator(1)), torch.randn(1, 8, generator=generator(2))
    start = torch.randn(1, 4, 4, generator=generator(3))
    places = pipe._prepare_latent_image_ids(1, 2, 2, "cpu", torch.float32)

    def network(u: Tensor, t: Tensor) -> Tensor:
        rest = {"pooled_projections": pooled, "encoder_hidden_states": prompt, "txt_ids": torch.zeros(3, 3)}
        return transformer(hidden_states=u, timestep=t.expand(1) / 1000, img_ids=places, **rest).sample

    def use() -> Tensor:
        return pipe(prompt_embeds=prompt, pooled_prompt_embeds=pooled, num_inference_steps=STEPS, height=32, width=32,
                    latents=start, output_type="latent").images  # fmt: skip

    theirs = use()
    pipe.scheduler = PushforwardScheduler.from_config(own.config, solver=solver, grid=grid)
    found = use()
    if grid is None and solver == "ddim":
        assert_close(found, theirs, SINGLE)
        return
    model = model_of(own, network)
    assert_close(
        found, run(SamplerSpec(solver, STEPS, grid=grid).plan(model, guided=True), model.denoiser, start), 1e-5
    )


def strengths(kind: Callable[[Path], Any], cls: Any, solver: str, tmp_path: Path, **settings: Any) -> Iterator[Tensor]:
    """What a pipeline makes of an image with less and less of it kept."""
    made = kind(tmp_path / "parts")
    known = signature(cls.__init__).parameters
    pipe = cls(**{name: part for name, part in made.components.items() if name in known})
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = PushforwardScheduler.from_config(pipe.scheduler.config, solver=solver)
    image = torch.rand(1, 3, 8, 8, generator=generator(4))
    for strength in (0.3, 0.6, 1.0):
        yield pipe(["a fox"], image=image, strength=strength, num_inference_steps=STEPS, output_type="latent",
                   height=8, width=8, generator=generator(5), **settings).images  # fmt: skip


@pytest.mark.parametrize("solver", ["heun", "kutta3"])
@pytest.mark.parametrize("name", ["StableDiffusion3Img2ImgPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline"])
def test_image_to_image_with_solvers_of_several_calls(name: str, solver: str, tmp_path: Path) -> None:
    """Flow models begin with a step of one call; Flux gives its sigmas, and takes every call for a step."""
    mask = {"mask_image": torch.ones(1, 1, 8, 8)} if "Inpaint" in name else {}
    kind = flux if "Flux" in name else stable_diffusion_3
    torch.manual_seed(3)
    images = list(strengths(kind, getattr(diffusers, name), solver, tmp_path, **mask))
    assert all(bool(image.isfinite().all()) for image in images)
    assert (images[0] - images[1]).abs().max() > 1e-3


@pytest.mark.parametrize("solver", ["ddim", "heun", "midpoint"])
def test_a_base_and_a_refiner(solver: str, tmp_path: Path) -> None:
    """Parts of a chain are the chain; where they part inside a step, that is said.

    Stable Diffusion XL parts after a time, which for Heun is always inside a step; in float32, 1e-4 of the value.
    """
    torch.manual_seed(3)
    base = stable_diffusion_xl(tmp_path)
    names = signature(diffusers.StableDiffusionXLImg2ImgPipeline.__init__).parameters
    parts = {name: part for name, part in base.components.items() if name in names}
    refiner = diffusers.StableDiffusionXLImg2ImgPipeline(**parts, add_watermarker=False)
    own, use = base.scheduler, {"num_inference_steps": STEPS, "output_type": "latent", "guidance_scale": 2.0}

    def draw(first: float | None) -> Tensor:
        for pipe in (base, refiner):
            pipe.set_progress_bar_config(disable=True)
            pipe.scheduler = PushforwardScheduler.from_config(own.config, solver=solver)
        latents = base(["a fox"], height=8, width=8, denoising_end=first, generator=generator(), **use).images
        return latents if first is None else refiner(["a fox"], image=latents, denoising_start=first, **use).images

    whole, refused = draw(None), 0
    for first in (0.3, 0.5, 0.8):
        try:
            assert_close(draw(first), whole, SINGLE)
        except pf.PushforwardError as error:
            assert "inside a step" in str(error)  # noqa: PT017 - which splits are inside is the pipeline's choice
            refused += 1
    assert refused <= {"ddim": 0, "heun": 3, "midpoint": 2}[solver]


# -- settings ---------------------------------------------------------------------------------------------------------


def test_settings_are_kept_and_changed(tmp_path: Path) -> None:
    """With the pipeline's folder, in a copy, and as another scheduler's configuration."""
    torch.manual_seed(1)
    pipe = diffusers.DDPMPipeline(diffusers.UNet2DModel(**UNET), diffusers.DDIMScheduler(steps_offset=1))
    pipe.scheduler = pf_scheduler = PushforwardScheduler.from_config(
        pipe.scheduler.config, solver="gddim", order=1, grid="angle"
    )
    pipe.save_pretrained(tmp_path)
    again = diffusers.DDPMPipeline.from_pretrained(tmp_path).scheduler
    assert type(again) is PushforwardScheduler
    kept = {"solver": "gddim", "grid": "angle", "settings": {"order": 1}, "trained": "DDIMScheduler"}
    assert {name: again.config[name] for name in kept} == kept
    pf_scheduler.set_timesteps(STEPS)
    again.set_timesteps(STEPS)
    expected = loop(pf_scheduler, draw(generator()))
    assert torch.equal(loop(again, draw(generator())), expected)
    more = PushforwardScheduler.from_pretrained(tmp_path, subfolder="scheduler", order=2)
    assert (more.config["solver"], more.config["grid"], more.config["settings"]) == ("gddim", "angle", {"order": 2})
    other = PushforwardScheduler.from_config(again.config, solver="heun")
    assert (other.config["grid"], other.config["settings"]) == (None, {})
    back = diffusers.DDIMScheduler.from_config(again.config)
    assert back.config.steps_offset == 1
    first = pf_scheduler.timesteps[0]
    pf_scheduler.step(toy(draw(generator()), first), first, draw(generator()))
    assert torch.equal(loop(copy.deepcopy(pf_scheduler), draw(generator())), expected)  # which begins anew


def test_defaults_stay_defaults() -> None:
    """Another class has its own: DDIM's `leading` spacing is not Euler's, unless it was asked for."""
    for given in ({}, {"timestep_spacing": "leading"}, {"timestep_spacing": "trailing"}):
        own = diffusers.DDIMScheduler(**given)
        ours = PushforwardScheduler.from_config(PushforwardScheduler.from_config(own.config).config, solver="ddim")
        for cls in (diffusers.EulerDiscreteScheduler, diffusers.DPMSolverMultistepScheduler):
            expected, found = cls.from_config(own.config), cls.from_config(ours.config)
            assert found.config.timestep_spacing == expected.config.timestep_spacing
            assert found.config.beta_end == expected.config.beta_end


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda c: PushforwardScheduler(c, "collocation"), "solves for all steps together"),
        (lambda c: PushforwardScheduler(c, "sscs"), "moves before it asks"),
        (lambda c: PushforwardScheduler(c, "rk45"), "chooses its steps as it goes"),
        (lambda c: PushforwardScheduler(c, "dddim"), "Unknown solver 'dddim'"),
        (lambda c: PushforwardScheduler(c, "fast.plan"), "has steps of its own"),
        (lambda c: PushforwardScheduler(c, "gddim", oder=2), "no setting 'oder'; it has order"),
        (lambda c: PushforwardScheduler(c, "gddim", order=[2]), "numbers and words"),
        (lambda c: PushforwardScheduler(c, "auto", variance=0.0), "variance must be positive"),
        (lambda c: PushforwardScheduler(c, "gddim", grid="angel"), "Unknown grid 'angel'"),
        (lambda c: PushforwardScheduler(c, "auto", grid="angle"), "chooses its own settings"),
        (lambda c: PushforwardScheduler({"beta_start": 0.1}), "does not say which scheduler"),
        (lambda c: PushforwardScheduler(diffusers.LCMScheduler()), "LCMScheduler, which cannot be read"),
        (lambda c: PushforwardScheduler(diffusers.ScoreSdeVeScheduler()), "load its folder"),
        (lambda c: loop(PushforwardScheduler(c, "ddim"), draw(generator()), eta=0.5), "give eta=0.5 to"),
        (lambda c: loop(PushforwardScheduler(c, "ddim"), draw(generator()), timesteps=[17]), "begins at timestep 17"),
        (
            lambda c: loop(PushforwardScheduler(c, "ddim"), draw(generator()), timesteps=[900, 17]),
            "turn of timestep 800",
        ),
        (lambda c: PushforwardScheduler(c, "ddim").set_timesteps(), "give num_inference_steps"),
        (lambda c: PushforwardScheduler(c, "ddim").set_timesteps(0), "give num_inference_steps"),
        (
            lambda c: PushforwardScheduler(c, "ddim").set_timesteps(timesteps=[1500, 500]),
            r"lie in \[0, 999\]; got 1500, 500\.",
        ),
        (lambda c: PushforwardScheduler(c, "ddim").set_timesteps(timesteps=[500, -3]), "got 500, -3"),
        (lambda c: PushforwardScheduler(c, "ddim").set_timesteps(timesteps=[500, 700]), "must strictly decrease"),
        (lambda c: PushforwardScheduler(c, "ddim").set_timesteps(3, timesteps=[700, 500]), "3 steps .* got 2 times"),
        (lambda c: PushforwardScheduler(c, "ddim").set_timesteps(sigmas=[900.0, 1.0, 0.0]), "or end at 0; got 900"),
        (lambda c: PushforwardScheduler(c, "ddim").add_noise(*[torch.ones(1, 1)] * 2, torch.tensor(1e3)), "got 1000"),
        (lambda c: PushforwardScheduler(CONFIGS["flow"], "ddim").set_timesteps(sigmas=[1.5, 0.5]), r"\[0, 1\]; got"),
        (
            lambda c: PushforwardScheduler(CONFIGS["flow"], "ddim").set_timesteps(sigmas=[1, 0.5], timesteps=[900]),
            "must agree",
        ),
        (
            lambda c: PushforwardScheduler(CONFIGS["flow"], "ddim").set_timesteps(
                sigmas=[1, 0.5], timesteps=[500, 900]
            ),
            "Timesteps must decrease",
        ),
    ],
)
def test_what_cannot_be_is_said(make: Callable[[Any], Any], says: str) -> None:
    with pytest.raises(pf.PushforwardError, match=says):
        make(CONFIGS["epsilon"].config)


def test_beginning_inside_a_step_is_refused() -> None:
    scheduler = PushforwardScheduler(CONFIGS["epsilon"], "heun")
    scheduler.set_begin_index(3)
    with pytest.raises(pf.PushforwardError, match="begin at a multiple of 2"):
        loop(scheduler, draw(generator()), timesteps=scheduler.timesteps[3:])


def test_the_size_of_the_image_must_be_said_where_the_grid_depends_on_it() -> None:
    scheduler = PushforwardScheduler(diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "ddim")
    with pytest.raises(pf.PushforwardError, match="give mu"):
        scheduler.set_timesteps(4)


# -- the example ------------------------------------------------------------------------------------------------------


def test_the_example_compares_samplers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """DDIM is the pipeline's own, to float32; the others are not. (An untrained network says nothing of accuracy.)"""
    monkeypatch.chdir(tmp_path)
    example = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "your_pipeline.py"))
    errors = example["main"](steps=4, count=2, many=8)
    assert errors["ddim"] == pytest.approx(errors["its own"], rel=1e-3)
    assert all(errors[name] != pytest.approx(errors["ddim"], rel=1e-3) for name in ("auto", "gddim", "heun", "ddpm"))
    assert "ddpm" in capsys.readouterr().out
    with Image.open("pipeline.png") as image:
        assert image.height > 7 / 2 * (image.width - 150)  # seven rows of two, and their names


# -- densities of steps -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("solver", "settings"), [("ddpm", {}), ("ddim", {"eta": 0.6}), ("dpm++", {"noise": 1.0})])
@pytest.mark.parametrize("kind", ["epsilon", "v", "flow"])
def test_steps_have_the_densities_of_the_executor(kind: str, solver: str, settings: dict[str, Any]) -> None:
    """Against `Diffusion.log_prob` on the same path, and again when the path is given; float64."""
    scheduler = PushforwardScheduler(CONFIGS[kind], solver, **settings)
    scheduler.set_timesteps(STEPS)
    state = draw(generator())
    noises = len(scheduler._plan.noises)
    states, found, outputs = [state], [], []
    for k, time in enumerate(scheduler.timesteps):
        outputs.append(toy(state, time).requires_grad_())
        state = scheduler.step(outputs[-1], time, state, generator=generator(k), return_dict=False)[0].detach()
        states.append(state)
        if k < noises:
            found.append(scheduler.log_prob())
    if noises < len(scheduler.timesteps):  # the last step is to an image without noise
        with pytest.raises(pf.PushforwardError, match="is not one random move"):
            scheduler.log_prob()
    path = Walked(states[0], torch.stack(states[1 : noises + 1]), states[-1])
    model = Model("toy", scheduler._model.process, replace(scheduler._clock.network, module=toy), (2, 8, 8))
    expected = log_densities(scheduler._plan, model.denoiser, path)
    assert torch.allclose(torch.stack(found), expected, rtol=1e-6)
    assert all(torch.autograd.grad(one.sum(), x)[0].abs().sum() > 0 for one, x in zip(found, outputs, strict=False))

    scheduler.set_timesteps(STEPS)
    for k, time in enumerate(scheduler.timesteps[:noises]):
        following = scheduler.step(outputs[k], time, states[k], prev_sample=states[k + 1], return_dict=False)[0]
        assert torch.equal(following, states[k + 1])
        assert torch.allclose(scheduler.log_prob(), found[k], rtol=1e-6)
