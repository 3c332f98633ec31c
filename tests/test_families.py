"""Pipelines of many families as models: each is made tiny, and measured against itself."""

from __future__ import annotations

import warnings
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import pushforward as pf
from support.conformance import examine, first_order, of_the_pipeline, relative
from support.families import FAMILIES
from support.families.sounds import ace_step
from support.families.tiny import Tiny
from support.families.unets import SQUARE, stable

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # of diffusers
]

REFUSED = {
    "Stable Diffusion inpaint with 4 channels": "blend an image in",
    "Kandinsky 2.2 inpainting": "blend an image in",
    "DeepFloyd IF inpainting": "blend an image in",
    "Flux inpainting": "blend an image in",
    "Stable Diffusion latent upscaler": "reckons with the noise levels",
    "HunyuanImage 2.1 with projected guidance": "otherwise in a later step",
    "HunyuanImage 2.1 distilled": "otherwise in a later step",
    "PRX in pixels": "begins with noise of a deviation near",
    "LTX 2": "pictures and their sound",
    "LTX Condition": "makes its first state in a way",
    "Cosmos": "makes its first state in a way",
    "Cosmos 2": "counts time to 80",
    "Cosmos 2 image": "counts time to 80",
    "Sana Sprint": "SCMScheduler, which cannot be read",
}
NO_ENCODER = {
    "Wan 2.2 5B image",
    "Allegro",
    "HunyuanVideo image",
    "Kandinsky 5 video of an image",
    "Marigold intrinsics",
}
KEEPING = {"Stable Diffusion latent upscaler", "Cosmos", "Cosmos 2", "Cosmos 2 image"}  # their own scheduler
ONE_BY_ONE = {"DeepFloyd IF super-resolution"}
NO_METHOD_OF_OURS = {"LCM", "Sana Video", "Sana Video image"}
ROUNDING = 1e-4  # of float32 over four guided steps, and of tables that are float32 in diffusers


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in REFUSED])
def test_a_family_is_a_model(name: str) -> None:
    found = examine(FAMILIES[name]())
    assert found.left
    assert (found.own is None) == (name in NO_METHOD_OF_OURS)
    assert found.own is None or found.own < ROUNDING
    assert found.parallel < ROUNDING  # the tolerance is 1e-5 of the data's size
    assert found.batch < ROUNDING
    assert found.inverse < 10 * ROUNDING
    assert found.gradient < 0.03  # networks of noise bend within a difference of float32
    assert found.encoder == (name not in NO_ENCODER)
    assert found.together == ("state" if name in ONE_BY_ONE else "times")


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_asked_is_refused_in_a_sentence(name: str) -> None:
    tiny = FAMILIES[name]()
    tiny.pipe.set_progress_bar_config(disable=True)
    scheduler = tiny.pipe.scheduler
    with pytest.raises(pf.PushforwardError, match=REFUSED[name]) as error:
        pf.from_pipeline(tiny.pipe, **tiny.call)
    assert "\n" not in str(error.value)
    assert tiny.pipe.scheduler is scheduler


@pytest.mark.parametrize("name", [name for name in REFUSED if name != "Sana Sprint"])
def test_what_is_refused_is_sampled_with_our_scheduler(name: str) -> None:
    """As most of the sentences say: DDIM, which is Euler's method for flows, makes the pipeline's own images."""
    tiny = FAMILIES[name]()
    if name in KEEPING:
        with pytest.raises(pf.PushforwardError, match="leave it that scheduler"):
            made(tiny, pf.PushforwardScheduler.from_config(tiny.pipe.scheduler, solver="ddim"))
        return
    first_order(tiny.pipe)
    own = made(tiny, tiny.pipe.scheduler)
    for one, other in zip(made(tiny, pf.PushforwardScheduler(tiny.pipe.scheduler, "ddim")), own, strict=True):
        assert relative(one, other) < ROUNDING


def made(tiny: Tiny, scheduler: Any) -> list[Tensor]:
    """What a pipeline makes in four steps with a scheduler."""
    tiny.pipe.scheduler = scheduler
    with torch.random.fork_rng():
        torch.manual_seed(0)  # some draw without the generator
        result = tiny.pipe(
            **tiny.call, num_inference_steps=4, output_type="np", generator=torch.Generator().manual_seed(0)
        )
    return [torch.as_tensor(x) for x in tree_leaves(result.to_tuple()) if isinstance(x, Tensor | np.ndarray)]


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("ControlNet", {"control_guidance_end": 0.5}),
        ("ControlNet", {"control_guidance_end": 0.3}),
        ("ControlNet", {"control_guidance_start": 0.4, "control_guidance_end": 0.6}),
        ("Lumina 2", {"cfg_trunc_ratio": 0.5}),
        ("GLIGEN", {"gligen_scheduled_sampling_beta": 0.3}),
        ("Stable Diffusion 3", {"skip_guidance_layers": [0]}),  # from .01 to .2 of the steps
        ("Semantic Stable Diffusion", {"editing_prompt": ["a smile"]}),  # after 10 steps
    ],
)
def test_what_acts_in_some_steps_only_is_refused(name: str, more: dict[str, Any]) -> None:
    """A run of one step, or of few, would silently do without."""
    tiny = FAMILIES[name]() if name in FAMILIES else Tiny(stable(diffusers.SemanticStableDiffusionPipeline), SQUARE)
    tiny.pipe.set_progress_bar_config(disable=True)
    with pytest.raises(pf.PushforwardError, match="otherwise in a later step"):
        pf.from_pipeline(tiny.pipe, **{**tiny.call, **more})


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("Z-Image", {"guidance_scale": 3.0, "cfg_truncation": 0.9}),  # guidance ends at a noise level of .1
        ("PAG SDXL", {"pag_scale": 3.0, "pag_adaptive_scale": 0.1}),  # acts above timestep 970
        ("Lumina", {"scaling_watershed": 0.98}),  # and this below a noise level of .02
        ("Wan 2.2 two experts image", {}),  # the first of them above .9
    ],
)
def test_what_acts_in_some_times_only_is_asked_at_its_time(name: str, more: dict[str, Any]) -> None:
    """Rows at many times are answered as each alone, whichever row comes first."""
    tiny = FAMILIES[name]()
    tiny.pipe.set_progress_bar_config(disable=True)
    model = pf.from_pipeline(tiny.pipe, **{**tiny.call, **more})
    net, scale = model.module, model.denoiser.time_scale  # type: ignore[attr-defined]
    assert net is not None
    times = scale * torch.linspace(model.process.t_max, model.process.t_min, 21, dtype=torch.float64)
    states = torch.randn(net.like.shape, generator=torch.Generator().manual_seed(1)).expand(21, *net.like.shape[1:])
    with torch.no_grad():
        alone = torch.cat([net(states[:1], t[None]) for t in times])
        for order in (slice(None), torch.arange(20, -1, -1)):
            assert relative(net(states, times[order]), alone[order]) < ROUNDING


@pytest.mark.parametrize("name", ["HunyuanVideo", "Wan 2.2 two experts image"])
def test_half_precision_is_no_dependence_on_others(name: str) -> None:
    """These keep states in float32, so that a batch's rounding is the networks', not theirs."""
    tiny = FAMILIES[name]()
    tiny.pipe.set_progress_bar_config(disable=True)
    net = pf.from_pipeline(tiny.pipe.to(torch.bfloat16), **tiny.call).module
    assert net is not None
    assert net.like.dtype == torch.float32
    assert net.rows.together == "times"  # type: ignore[union-attr]


@pytest.mark.parametrize("interval", [(0.4, 0.6), (0.1, 0.2), (0.97, 1.0)])
def test_what_remembers_steps_in_some_times_only_is_refused(interval: tuple[float, float]) -> None:
    """ACE-Step's guidance has momentum, and with this none at the times where a pipeline is usually asked."""
    tiny = ace_step()
    tiny.pipe.set_progress_bar_config(disable=True)
    with pytest.raises(pf.PushforwardError, match="otherwise in a later step"):
        pf.from_pipeline(tiny.pipe, **tiny.call, cfg_interval_start=interval[0], cfg_interval_end=interval[1])


@pytest.mark.parametrize("lyrics", [{}, {"lyrics": "la la"}])
def test_words_and_their_defaults_are_repeated_with_the_prompt(lyrics: dict[str, str]) -> None:
    """ACE-Step takes lyrics for each prompt, and no number of sounds; its encoder is told rows by their numbers."""
    tiny = ace_step()
    tiny.pipe.set_progress_bar_config(disable=True)
    call = {**tiny.call, **lyrics, "guidance_scale": 1.0}
    model = pf.from_pipeline(tiny.pipe, **call)
    assert model.module.rows.together == "times"  # type: ignore[union-attr]
    assert of_the_pipeline(tiny.pipe, call, model) < ROUNDING


def test_our_scheduler_says_why_it_cannot_stand_for_one_of_which_the_class_is_asked() -> None:
    """Bria gives DDIM no noise levels, and those of a flow to all that it does not know."""
    tiny = FAMILIES["Bria with DDIM"]()
    tiny.pipe.scheduler = pf.PushforwardScheduler(tiny.pipe.scheduler, "ddim")
    with pytest.raises(pf.PushforwardError, match="goes by the class of its scheduler; leave it that scheduler"):
        tiny.pipe(**tiny.call, num_inference_steps=4)


def test_what_a_sampler_decides_is_left_out_with_a_warning() -> None:
    tiny = FAMILIES["Stable Diffusion 1"]()
    tiny.pipe.set_progress_bar_config(disable=True)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        pf.from_pipeline(tiny.pipe, **tiny.call, num_inference_steps=5)
    assert [str(one.message) for one in told if "left out" in str(one.message)] == [
        "num_inference_steps is left out of the pipeline's call: say `steps` where you sample."
    ]
