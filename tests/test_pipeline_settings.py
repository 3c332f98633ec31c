"""Schedulers and arguments that users change: each is honoured, left out with a warning, or refused in a sentence.

Tiny random networks. Steps are compared with the pipeline's own scheduler's, to 1e-6 of the first.
"""

import dataclasses
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import pushforward as pf
from pushforward.execute import run
from pushforward.model.contents import model_digest
from pushforward.plan.gddim import ddim
from support.conformance import of_the_pipeline, relative
from support.families import FAMILIES
from support.pipelines import TABLE, flux, stable_diffusion, stable_diffusion_3

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),  # of diffusers
]
CALL: dict[str, Any] = {"prompt": "a fox", "guidance_scale": 3.0, "height": 8, "width": 8}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
UNFIT = {
    "goes from images to noise": (stable_diffusion, "DDIMInverseScheduler", {}),
    "takes no steps of a single kind": (stable_diffusion, "ScoreSdeVeScheduler", {}),
    "tells its scheduler its sigmas, which": (flux, "FlowMatchHeunDiscreteScheduler", {}),
    "their states grow": (stable_diffusion_3, "FlowMatchLCMScheduler", {"scale_factors": [0.5, 1.0]}),
}


@pytest.mark.parametrize("sentence", UNFIT)
def test_schedulers_that_do_not_fit_are_refused(sentence: str, tmp_path: Path) -> None:
    make, scheduler, settings = UNFIT[sentence]
    pipe = make(tmp_path)
    pipe.scheduler = getattr(diffusers, scheduler)(**settings)
    with pytest.raises(pf.PushforwardError, match=sentence):
        pf.from_pipeline(pipe, **CALL)


@pytest.mark.parametrize(
    ("scheduler", "settings"), [("SASolverScheduler", FLOW), ("FlowMatchLCMScheduler", {"shift": 3.0})]
)
def test_flows_of_other_schedulers(scheduler: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """They are flows, not the tables of noise that their classes have, too."""
    pipe = stable_diffusion_3(tmp_path)
    pipe.scheduler = getattr(diffusers, scheduler)(**settings)
    model = pf.from_pipeline(pipe, **CALL)
    assert model.process.name == "flow"
    pipe.scheduler.set_timesteps(4)
    theirs = pipe.scheduler.sigmas.double()[:4]
    assert float((model.plan("ddim", 4).times[:4] - theirs).abs().max()) <= 1e-6


@pytest.mark.parametrize("make", [stable_diffusion, stable_diffusion_3, flux], ids=lambda make: make.__name__)
def test_our_scheduler_is_read_as_the_one_that_it_stands_for(make: Any, tmp_path: Path) -> None:
    """In memory and from a folder that keeps it; its noise levels cannot be set, as those of others can."""
    pipe = make(tmp_path)
    plain = pf.from_pipeline(pipe, **CALL).sample(1, solver="ddim", steps=3)
    pipe.scheduler = pf.PushforwardScheduler(pipe.scheduler, "gddim", order=2)
    pipe.save_pretrained(tmp_path / "kept")
    for model in (pf.from_pipeline(pipe, **CALL), pf.load(tmp_path / "kept", call=CALL)):
        found = model.sample(1, solver="ddim", steps=3)
        assert (found - plain).abs().max() <= 1e-5 * plain.abs().max()


@pytest.mark.parametrize("sigmas", [[1.0], [1.0, 0.8, 0.5, 0.4, 0.2]], ids=["one", "five"])
def test_noise_levels_of_the_call(sigmas: list[float], tmp_path: Path) -> None:
    """They say how many steps there are, few or many."""
    pipe = flux(tmp_path)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    model = pf.from_pipeline(pipe, **CALL, sigmas=sigmas)
    assert (
        float((model.plan("ddim", len(sigmas)).times[:-1] - torch.tensor(sigmas, dtype=torch.float64)).abs().max())
        <= 1e-6
    )
    with pytest.raises(pf.PushforwardError, match="take as many steps, not 4"):
        model.plan("ddim", 4)


LATER = {
    "timestep_spacing": (stable_diffusion, "trailing"),
    "prediction_type": (stable_diffusion, "v_prediction"),
    "beta_end": (stable_diffusion, 0.02),  # of which the scheduler has made its table before
    "use_karras_sigmas": (stable_diffusion_3, True),
    "shift_terminal": (stable_diffusion_3, 0.1),
    "invert_sigmas": (stable_diffusion_3, True),
    "base_shift": (flux, 0.2),  # by which its steps do not go: pipelines read what the scheduler was made with
}


@pytest.mark.parametrize("setting", LATER)
def test_settings_that_are_changed_in_the_scheduler(setting: str, tmp_path: Path) -> None:
    """As attributes of its configuration, by which its steps go. The truth is the pipeline's own result."""
    make, value = LATER[setting]
    pipe = make(tmp_path)
    setattr(pipe.scheduler.config, setting, value)
    assert of_the_pipeline(pipe, CALL, pf.from_pipeline(pipe, **CALL)) < 1e-5
    own = made(pipe)
    pipe.scheduler = pf.PushforwardScheduler(pipe.scheduler, "ddim")
    assert relative(made(pipe), own) < 1e-5


def test_schedulers_that_are_changed_otherwise_are_refused(tmp_path: Path) -> None:
    """Their settings do not say what they are."""
    pipe = stable_diffusion(tmp_path)
    table = pipe.scheduler.alphas_cumprod
    for other in (table**2, table[:500]):
        pipe.scheduler.alphas_cumprod = other
        for make in (lambda: pf.from_pipeline(pipe, **CALL), lambda: pf.PushforwardScheduler(pipe.scheduler)):
            with pytest.raises(pf.PushforwardError, match="another table alphas_cumprod than its settings say"):
                make()
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    flow.set_shift(1.5)
    with pytest.raises(pf.PushforwardError, match=r"set to 1\.5 later"):
        pf.PushforwardScheduler(flow)


def made(pipe: Any) -> torch.Tensor:
    """The states that a pipeline comes to in four steps."""
    pipe.set_progress_bar_config(disable=True)
    states: torch.Tensor = pipe(
        **CALL, num_inference_steps=4, output_type="latent", generator=torch.Generator().manual_seed(0)
    ).images
    return states


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "CogVideoXDDIMScheduler"])
def test_steps_that_do_not_end_where_the_next_ones_begin(scheduler: str, tmp_path: Path) -> None:
    """DDIM's with linspace spacing; a plan with their ends comes to the pipeline's own result."""
    pipe = stable_diffusion(tmp_path)
    settings = {name: value for name, value in TABLE.items() if name != "steps_offset"}
    pipe.scheduler = getattr(diffusers, scheduler)(**settings, timestep_spacing="linspace")
    with pytest.warns(UserWarning, match="do not end where its next ones begin"):
        model = pf.from_pipeline(pipe, **CALL)
    process, asked = model.process, torch.tensor([999, 666, 333, 0], dtype=torch.float64)
    ends = (asked - 250 + 1) / 1000
    plan = ddim(process, torch.cat([(asked + 1) / 1000, ends.new_zeros(1)]), arrivals=ends.clamp(min=process.t_min))
    own = made(pipe)
    start = torch.randn(own.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert relative(run(plan, model.denoiser, start), own) < 1e-5
    assert torch.equal(model.plan("ddim", 4).asked_times, plan.asked_times[:3])  # the last begins where it ends


def test_a_model_keeps_the_scheduler_that_it_was_made_with(tmp_path: Path) -> None:
    """The pipeline may get another; models with other guidance are made later."""
    pipe = stable_diffusion(tmp_path)
    model, other = pf.from_pipeline(pipe, **CALL), pf.from_pipeline(pipe, **CALL)
    wanted = model.sample(1, solver="ddim", steps=2, guidance=5.0, seed=0)
    known = model_digest(other)
    pipe.scheduler = diffusers.ScoreSdeVeScheduler()
    assert torch.equal(other.sample(1, solver="ddim", steps=2, guidance=5.0, seed=0), wanted)
    assert model_digest(other) == known


def test_a_single_step_that_stays_where_it_begins_is_refused(tmp_path: Path) -> None:
    """As of PNDM's settings, which Stable Diffusion comes with, without their offset."""
    pipe = stable_diffusion(tmp_path)
    pipe.scheduler = diffusers.DDIMScheduler(set_alpha_to_one=False)
    with pytest.raises(pf.PushforwardError, match="would do nothing; take more steps"):
        pf.from_pipeline(pipe, **CALL).sample(1, solver="ddim", steps=1)


@pytest.mark.parametrize("name", ["DeepFloyd IF", "DeepFloyd IF super-resolution"])
def test_learned_variances_are_left_out(name: str) -> None:
    """The prediction beside them is the same whether the scheduler wants them or not."""
    tiny = FAMILIES[name]()
    assert tiny.pipe.scheduler.config.variance_type == "learned_range"
    images = pf.from_pipeline(tiny.pipe, **tiny.call).sample(2, solver="ddim", steps=2)
    tiny.pipe.scheduler.register_to_config(variance_type="fixed_small")
    assert pf.from_pipeline(tiny.pipe, **tiny.call).sample(2, solver="ddim", steps=2).equal(images)


@pytest.mark.parametrize("argument", ["denoising_end", "denoising_start"])
def test_shares_of_the_steps_are_the_samplers(argument: str) -> None:
    """Networks answer as without; which steps are taken is said of the solver."""
    tiny = FAMILIES["SDXL refiner" if argument == "denoising_start" else "SDXL"]()
    with pytest.warns(UserWarning, match=f"{argument} is left out"):
        model = pf.from_pipeline(tiny.pipe, **tiny.call, **{argument: 0.5})
    plain = pf.from_pipeline(tiny.pipe, **tiny.call)
    assert torch.equal(model.sample(1, solver="ddim", steps=2, seed=1), plain.sample(1, solver="ddim", steps=2, seed=1))


def test_one_sound_is_a_batch(tmp_path: Path) -> None:
    """A single one of shape `(channels, samples)` is told from a batch of them by the model's shape."""
    model = pf.from_pipeline(stable_diffusion(tmp_path), **CALL)
    sound = dataclasses.replace(
        model,
        decoder=lambda x: x.flatten(1).unsqueeze(1),
        encoder=lambda x: x.view(len(x), *model.shape),
        image_shape=(1, 64),
    )
    batch = sound.sample(2, solver="ddim", steps=2, seed=1)
    both = sound.invert(batch, solver="ddim", steps=2).code
    one = sound.invert(batch[0], solver="ddim", steps=2).code
    assert torch.allclose(both.start[:1], one.start, atol=1e-4)
