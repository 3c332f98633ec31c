"""Loops of Modular diffusers with our solvers in their place: they make what the families' own loops make."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import pushforward as pf
from pushforward.errors import PushforwardError

pytest.importorskip("diffusers", reason="optional dependency")
pytest.importorskip("diffusers.modular_pipelines", reason="of a newer version")

import diffusers

from pushforward.integrations.diffusers import modular
from pushforward.integrations.diffusers.modular import save_block, with_pushforward
from pushforward.model.diffusers.blocks import _rows
from support import pipelines
from support.modular import FAMILIES, SIZE, drawn, stable_diffusion_xl, table

STEPS = 6
ONE_IMAGE_CODE = ("flux", "qwen_image", "stable_diffusion_xl")


def called(pipe: Any, told: dict[str, Any], output: Any = "latents", **more: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    usual = {"height": SIZE, "width": SIZE, "num_inference_steps": STEPS, "generator": generator}
    return pipe(**{**usual, **told, **more}, output=output)


def near(one: torch.Tensor, other: torch.Tensor, close: float = 1e-4) -> bool:
    return float((one - other).abs().max()) <= close * max(1.0, float(other.abs().max()))


def loops(block: Any) -> Iterator[Any]:
    for one in block.sub_blocks.values():
        if isinstance(one, modular.Loop):
            yield one
        else:
            yield from loops(one)


def unguided(pipe: Any) -> Any:
    if hasattr(pipe, "guider"):
        pipe.update_components(guider=diffusers.ClassifierFreeGuidance(guidance_scale=1.5))
    return pipe


def picture() -> Any:
    return Image.fromarray((127.5 + 40 * drawn(5, SIZE, SIZE, 3).numpy()).clip(0, 255).astype(np.uint8))


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Any]]:
    return FAMILIES[request.param]()


def test_the_loop_makes_what_the_familys_own_makes(family: tuple[Any, dict[str, Any]]) -> None:
    pipe, told = family
    own = called(pipe, told)
    one_by_one = called(with_pushforward(pipe, "ddim"), told)
    assert near(one_by_one, own)
    assert not near(called(with_pushforward(pipe, "gddim:order=2"), told), own, 1e-3)


def test_all_steps_at_once_make_the_same_in_fewer_calls(family: tuple[Any, dict[str, Any]]) -> None:
    pipe, told = family
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    calls: list[int] = []
    sequential = called(with_pushforward(pipe, "ddim"), told, num_inference_steps=16)
    with_pushforward(pipe, "ddim", pf.Parallel(tolerance=1e-5))
    called(pipe, told, num_inference_steps=16)  # finds out how many rows it can be asked about
    handle = getattr(pipe, name).register_forward_hook(lambda *_: calls.append(1))
    at_once = called(pipe, told, num_inference_steps=16)
    handle.remove()
    assert near(at_once, sequential, 1e-3)
    guided = 2 if hasattr(pipe, "guider") else 1
    assert len(calls) < 16 * guided


def test_nothing_of_the_pipeline_is_changed(family: tuple[Any, dict[str, Any]]) -> None:
    pipe, told = family
    networks = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    before = {name: dict(vars(part)) for name, part in pipe.components.items() if "guider" in name}
    hooks = {name: len(part._forward_pre_hooks) for name, part in networks.items()}
    scheduler = pipe.scheduler
    called(with_pushforward(pipe, "gddim:order=2", parallel=True), told)
    assert {name: len(part._forward_pre_hooks) for name, part in networks.items()} == hooks
    assert {name: vars(getattr(pipe, name)) for name in before} == before
    assert pipe.scheduler is scheduler


@pytest.mark.parametrize("name", ONE_IMAGE_CODE)
def test_codes_make_the_images_that_they_are_of(name: str) -> None:
    pipe, told = FAMILIES[name]()
    with_pushforward(pipe, "ddim:end=0.01")
    outputs = ["latents", "code"]
    first = called(pipe, told, outputs)
    again = called(pipe, told, outputs, latents=first["code"])
    assert torch.equal(again["latents"], first["latents"])
    pipe, told = FAMILIES[name](images=1)
    with_pushforward(unguided(pipe), "ddim:end=0.01")
    found = called(pipe, told, outputs, image=picture(), strength=1.0, invert=True)
    decoded = called(pipe, told, outputs, latents=found["code"])
    assert near(decoded["latents"], found["latents"], 2e-4)
    assert not near(decoded["latents"], first["latents"][:1], 0.1)


@pytest.mark.parametrize("name", ["flux", "stable_diffusion_xl"])
def test_steps_may_begin_with_a_noisy_image(name: str) -> None:
    pipe, told = FAMILIES[name](images=1)
    more = {"image": picture(), "strength": 0.5}
    own = called(pipe, told, **more)
    assert near(called(with_pushforward(pipe, "ddim"), told, **more), own)
    found = called(with_pushforward(pipe, "auto"), told, ["latents", "code"], **more)
    assert near(found["latents"], own, 0.5)
    assert found["code"] is None
    with pytest.raises(PushforwardError, match="give strength=1"):
        called(with_pushforward(pipe, "ddim:end=0.01"), told, invert=True, **more)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_states_of_euler_are_brought_to_ours_and_back(spacing: str) -> None:
    pipe, told = stable_diffusion_xl()
    pipe.update_components(scheduler=table(diffusers.EulerDiscreteScheduler, timestep_spacing=spacing))
    own = called(pipe, told)
    assert near(called(with_pushforward(pipe, "ddim"), told), own)
    found = called(with_pushforward(pipe, "ddim:end=0.01"), told, ["latents", "code"])
    again = called(pipe, told, ["latents", "code"], latents=found["code"])
    assert near(again["latents"], found["latents"], 1e-5)
    back = called(pipe, told, ["latents", "code"], latents=found["latents"], invert=True)
    assert near(back["code"], found["code"], 1e-3)


def test_flows_whose_time_runs_the_other_way() -> None:
    pipe, told = FAMILIES["flux"](images=1)
    pipe.update_components(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True))
    theirs = torch.as_tensor(np.asarray(called(pipe, told, "images", output_type="pt")))
    made = called(with_pushforward(pipe, "ddim"), told, ["images", "code"], output_type="pt")
    assert near(torch.as_tensor(np.asarray(made["images"])), theirs)
    model = pf.from_pipeline(pipe, **{"height": SIZE, "width": SIZE, **told})
    chain = model.diffusion(solver="ddim", steps=STEPS)
    images = chain.decode(pf.Code(chain.code(made["code"]))).detach()
    assert near((images / 2 + 0.5).clamp(0, 1), theirs)


def test_a_last_step_to_clean_data_has_no_inverse() -> None:
    pipe, told = stable_diffusion_xl(images=1)
    for solver in ("auto", "ddim:end=0"):
        with pytest.raises(PushforwardError, match="has no inverse"):
            called(with_pushforward(pipe, solver), told, invert=True)


def test_how_a_loop_is_asked_is_found_out_once() -> None:
    pipe, told = FAMILIES["z_image"]()
    calls: list[int] = []
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    counts = []
    with_pushforward(pipe, "ddim")
    for prompts in (told, {**told, "prompt_embeds": told["prompt_embeds"][::-1]}, FAMILIES["z_image"](images=4)[1]):
        calls.clear()
        called(pipe, prompts)
        counts.append(len(calls))
    assert counts[0] > counts[1] == counts[2] == STEPS


def test_noise_of_stochastic_solvers_is_the_generators() -> None:
    pipe, told = stable_diffusion_xl()
    with_pushforward(pipe, "ddim:eta=1.0")
    first = called(pipe, told)
    assert torch.equal(called(pipe, told), first)
    assert not near(called(with_pushforward(pipe, "ddim"), told), first, 0.1)


def test_what_a_solver_cannot_do_is_refused_in_a_sentence() -> None:
    pipe, told = stable_diffusion_xl()
    with pytest.raises(PushforwardError, match="Unknown solver"):
        with_pushforward(pipe, "nosuch")
    with pytest.raises(PushforwardError, match="steps are taken"):
        with_pushforward(pipe, "rk45")
    pipe.update_components(guider=diffusers.ClassifierFreeGuidance(guidance_scale=5.0, start=0.2))
    with pytest.raises(PushforwardError, match="part of the steps only"):
        called(with_pushforward(pipe, "ddim"), told)
    with pytest.raises(PushforwardError, match="audio beside the latents"):
        with_pushforward(diffusers.modular_pipelines.ltx2.LTX2Blocks())
    with pytest.raises(PushforwardError, match="no denoising loop"):
        with_pushforward(diffusers.modular_pipelines.SequentialPipelineBlocks())


def test_copies_of_blocks_know_nothing_of_a_pipeline() -> None:
    pipe, told = stable_diffusion_xl()
    called(with_pushforward(pipe, "ddim"), told)
    used = [loop for loop in loops(pipe._blocks) if loop._asked]
    assert used
    copied = copy.deepcopy(pipe._blocks)
    assert not any(loop._asked for loop in loops(copied))
    assert all(loop.sub_blocks is loop.loop.sub_blocks for loop in loops(copied))
    assert "all steps at once" in str(next(loops(with_pushforward(copied, "ddim", True))).description)


def test_a_folder_can_be_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    from diffusers.modular_pipelines.stable_diffusion_xl.denoise import StableDiffusionXLDenoiseStep

    folder = save_block(StableDiffusionXLDenoiseStep, tmp_path / "shared", solver="ddim")
    config = json.loads((folder / "modular_config.json").read_text())
    assert config["auto_map"] == {"ModularPipelineBlocks": "block.PushforwardStableDiffusionXLDenoiseStep"}
    load = diffusers.ModularPipelineBlocks.from_pretrained
    block = load(str(folder), trust_remote_code=True)
    assert (block.spec.solver, block.spec.parallel) == ("ddim", None)
    assert load(str(folder), trust_remote_code=True, solver="gddim:order=2", parallel=True).spec.parallel
    pipe, told = stable_diffusion_xl()
    own = called(pipe, told)
    denoising = pipe._blocks.sub_blocks["denoise"].sub_blocks["denoise"]
    denoising.sub_blocks["text2image"] = block
    assert near(called(pipe, told), own)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pipeline_in_memory_is_a_model(name: str) -> None:
    pipe, told = FAMILIES[name](images=1)
    outputs = ["code", "videos" if "num_frames" in told else "images"]
    own = called(with_pushforward(pipe, "ddim"), told, outputs, output_type="pt")
    model = pf.from_pipeline(pipe, **{"height": SIZE, "width": SIZE, **told})
    chain = model.diffusion(solver="ddim", steps=STEPS)
    images = chain.decode(pf.Code(chain.code(own["code"]))).detach()
    made = (images / 2 + 0.5).clamp(0, 1)
    seen = torch.as_tensor(np.asarray(own[outputs[1]]))
    assert near(made if made.ndim == 4 else made.movedim(1, 2), seen)  # videos are frames of channels
    assert near(model.sample(2, solver="ddim", steps=4, parallel=True), model.sample(2, solver="ddim", steps=4), 1e-3)
    if name == "flux":
        assert float(model.invert(images, solver="ddim", steps=STEPS).residual.max()) < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_pass_through_blocks(name: str) -> None:
    pipe, told = FAMILIES[name](images=1)
    model = pf.from_pipeline(pipe, **{"height": SIZE, "width": SIZE, **told})
    ask = model.denoiser.at(model.process, torch.tensor([0.5], dtype=torch.float64), torch.zeros(1, *model.shape))
    towards, step = drawn(1, 1, *model.shape), 2e-3

    def loss(state: torch.Tensor) -> torch.Tensor:
        return model.images(ask(0, state)).square().mean()

    state = drawn(0, 1, *model.shape).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(state), state)
    with torch.no_grad():
        difference = (loss(state + step * towards) - loss(state - step * towards)) / (2 * step)
    assert float((gradient * towards).sum()) == pytest.approx(float(difference), rel=2e-2, abs=1e-5)


def test_a_model_of_blocks_reads_prompts(tmp_path: Path) -> None:
    parts = pipelines.flux(tmp_path).components
    pipe = diffusers.FluxAutoBlocks().init_pipeline()
    pipe.update_components(**{name: part for name, part in parts.items() if name in pipe.component_names or part})
    model = pf.from_pipeline(pipe, height=SIZE, width=SIZE, max_sequence_length=8)
    fox, dog = (model.sample(1, solver="ddim", steps=3, labels=[prompt]) for prompt in ("a fox", "a dog"))
    assert not near(fox, dog, 1e-3)
    both = model.sample(2, solver="ddim", steps=3, labels=["a fox", "a dog"], parallel=True)
    assert near(both[:1], fox, 1e-3)
    told = pipe(prompt="a fox", height=SIZE, width=SIZE, max_sequence_length=8, num_inference_steps=3, output="images",
                output_type="pt", generator=torch.Generator().manual_seed(0))  # fmt: skip
    assert told.shape == fox.shape
    with pytest.raises(PushforwardError, match="takes no input 'promt'; do you mean prompt"):
        pf.from_pipeline(pipe, promt="a fox")
    with pytest.warns(UserWarning, match="latents is left out of the pipeline's call"):
        pf.from_pipeline(pipe, height=SIZE, width=SIZE, max_sequence_length=8, latents=drawn(0, 1, 16, 16))
    with pytest.raises(PushforwardError, match="load its components first"):
        pf.from_pipeline(diffusers.FluxAutoBlocks().init_pipeline())


def test_what_a_state_says_of_each_image_is_told_for_each_row() -> None:
    which, (a, b, c) = [1, 1, 0], drawn(0, 3, 2, 5, 4)
    assert torch.equal(_rows(a, 2, which), a[which])
    assert torch.equal(_rows({"of": a}, 2, which)["of"], a[which])
    assert all(map(torch.equal, _rows([a, b, c], 2, which), [a[which], b[which], c[which]]))
    assert all(map(torch.equal, _rows([a, b], 2, which), [a[which], b[which]]))
    prompts = [a[0, :2], a[1, :2]]  # of two tokens each
    assert [one is prompts[k] for one, k in zip(_rows(prompts, 2, which), which, strict=True)] == [True] * 3
    assert _rows((4, 8), 2, which) == (4, 8)
    assert _rows("of all", 6, which) == "of all"
