"""Pipelines of `diffusers` as models, against the pipelines themselves: what networks are told, and the images.

All have random weights and are written by the tests, tokenizers included. Both sides run in float32, where the
schedulers' tables differ from ours by 1e-5; guidance of 3 and four steps make that at most 1e-4 of the largest value.
"""

import copy as copy_module
import dataclasses
import json
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import pushforward as pf
from pushforward.execute import run
from pushforward.model import Model
from pushforward.model.diffusers.load import diffusers_model
from pushforward.model.diffusers.text import KEPT
from pushforward.plan import ddim, grid
from support.pipelines import (
    dit,
    flux,
    latent_diffusion,
    stable_diffusion,
    stable_diffusion_3,
    stable_diffusion_xl,
    unet,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),  # of diffusers
    pytest.mark.filterwarnings("ignore:.* reads . tokens of the prompt:UserWarning"),  # the second of PROMPTS is cut
]

CLOSE = 1e-4
STEPS, GUIDANCE = 4, 3.0
PROMPTS = ["a fox", "the red house by the sea, at night"]  # the second is cut: the tokenizer takes nine tokens
TEXTS = ["sd", "sd-v", "sdxl", "sdxl-one", "ldm", "sd3", "sd3-no-t5", "flux", "schnell"]
KINDS = [*TEXTS, "dit"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """More only wait for one another on networks this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


MAKE: dict[str, Callable[[Path], Any]] = {
    "sd": stable_diffusion,
    "sd-v": lambda folder: stable_diffusion(folder, prediction_type="v_prediction"),
    "sdxl": stable_diffusion_xl,
    "sdxl-one": lambda folder: stable_diffusion_xl(folder, first=False),
    "ldm": latent_diffusion,
    "dit": dit,
    "sd3": stable_diffusion_3,
    "sd3-no-t5": lambda folder: stable_diffusion_3(folder, third=False),
    "flux": flux,
    "schnell": lambda folder: flux(folder, distilled=False),
}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """A pipeline of a kind, made once, and the folder where it lies."""

    @cache
    def make(kind: str) -> tuple[Any, Path]:
        torch.manual_seed(3)
        folder = tmp_path_factory.mktemp(kind)
        made = MAKE[kind](folder)
        made.set_progress_bar_config(disable=True)
        made.save_pretrained(folder / "model")
        if kind == "dit":
            edit(folder / "model" / "model_index.json", id2label={"0": "tench, Tinca tinca", "1": "goldfish"})
        return made, folder / "model"

    return make


@pytest.fixture(scope="module")
def read(pipe: Callable[[str], tuple[Any, Path]]) -> Callable[[str], Model]:
    """The model of a kind, read once."""
    return cache(lambda kind: diffusers_model(pipe(kind)[1], size=8 if kind in ("flux", "schnell") else None))


@pytest.fixture
def copy(pipe: Callable[[str], tuple[Any, Path]], tmp_path: Path) -> Callable[[str], Path]:
    """A folder of a kind to spoil."""
    return lambda kind: Path(shutil.copytree(pipe(kind)[1], tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **changes}))


def state(model: Model, count: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(model.state_shape(count), generator=torch.Generator().manual_seed(seed))


def solve(model: Model, start: Tensor) -> Tensor:
    return run(ddim(model.process, grid.default(model.process, STEPS, **model.grid)), model.denoiser, start)


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = CLOSE) -> None:
    assert ours.shape == theirs.shape
    error, size = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    assert error <= tolerance * max(size, 1), f"{error:.2e} of {size:.2e}"


# -- against the pipelines ------------------------------------------------------------------------------------------


def told(pipe: Any, kind: str, prompts: list[str]) -> tuple[Tensor, ...]:
    """What the pipeline makes of prompts."""
    if kind == "ldm":
        settings = {"padding": "max_length", "max_length": 77, "truncation": True, "return_tensors": "pt"}
        return (pipe.bert(pipe.tokenizer(prompts, **settings).input_ids)[0],)
    if kind in ("flux", "schnell"):
        return pipe.encode_prompt(prompts)[:2]
    if kind.startswith("sd3"):
        return pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)[::2]
    if kind.startswith("sdxl"):
        return pipe.encode_prompt(prompts, do_classifier_free_guidance=False)[::2]
    return pipe.encode_prompt(prompts, "cpu", 1, False)[:1]


@pytest.mark.parametrize("kind", TEXTS)
@torch.no_grad()
def test_prompts_are_encoded_as_the_pipeline_does(kind: str, pipe: Any, read: Any) -> None:
    """One at a time, where the pipeline takes all at once: 1e-5 of rounding."""
    ours, theirs = read(kind).text(PROMPTS), told(pipe(kind)[0], kind, PROMPTS)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other, 1e-5)


@pytest.mark.parametrize("kind", TEXTS)
@torch.no_grad()
def test_networks_are_told_what_the_pipeline_tells_them(kind: str, pipe: Any, read: Any) -> None:
    """Also at times between timesteps."""
    theirs, model = pipe(kind)[0], read(kind)
    u, t, tensors = state(model), torch.tensor([371.5, 20.0]), told(theirs, kind, PROMPTS)
    ours = model.given(PROMPTS)
    answer = ours.module(u, t, ours.denoiser.condition)
    if kind in ("flux", "schnell"):
        packed = theirs._pack_latents(u, 2, 4, 4, 4)
        places = theirs._prepare_latent_image_ids(2, 2, 2, "cpu", torch.float32)
        guidance = torch.full((2,), 3.5) if kind == "flux" else None
        expected = theirs.transformer(
            packed, tensors[0], tensors[1], t / 1000, places, torch.zeros(512, 3), guidance=guidance
        ).sample
        expected = theirs._unpack_latents(expected, 8, 8, 2)
    elif kind.startswith("sd3"):
        expected = theirs.transformer(u, tensors[0], tensors[1], t).sample
    else:
        sizes = torch.tensor([[8.0, 8.0, 0.0, 0.0, 8.0, 8.0]]).expand(2, 6)
        more = {"text_embeds": tensors[1], "time_ids": sizes} if kind.startswith("sdxl") else None
        expected = theirs.unet(u, t, tensors[0], added_cond_kwargs=more).sample
    assert_close(answer, expected, 1e-5)


@pytest.mark.parametrize(
    ("kind", "negative"),
    [(kind, negative) for kind in TEXTS for negative in ("", "blurry") if (kind, negative) != ("ldm", "blurry")],
)
def test_images_are_the_pipelines(kind: str, negative: str, pipe: Any, read: Any) -> None:
    """Guided, from the same latents, by DDIM or, for flow matching, Euler. (LDM's has no negative prompts.)"""
    theirs, model = pipe(kind)[0], dataclasses.replace(read(kind), negative=negative)
    settings: dict[str, Any] = {"num_inference_steps": STEPS, "latents": state(model), "output_type": "latent"}
    ours = solve(model.given(PROMPTS, GUIDANCE), settings["latents"])
    if kind == "ldm":
        settings["output_type"] = "np"
        ours = (model.images(ours) / 2 + 0.5).clamp(0, 1)
    if kind in ("flux", "schnell"):
        settings["latents"] = theirs._pack_latents(settings["latents"], 2, 4, 4, 4)
        settings |= {"true_cfg_scale": GUIDANCE, "height": 8, "width": 8, "negative_prompt": [negative] * 2}
    else:
        settings |= {"guidance_scale": GUIDANCE, **({"negative_prompt": [negative] * 2} if negative else {})}
    expected = theirs(PROMPTS, **settings).images
    if kind == "ldm":
        expected = torch.from_numpy(expected).movedim(-1, 1)
    assert_close(ours, theirs._unpack_latents(expected, 8, 8, 2) if kind in ("flux", "schnell") else expected)


def test_images_by_class_are_the_pipelines(pipe: Any, read: Any) -> None:
    theirs, model = pipe("dit")[0], read("dit")
    generator = torch.Generator().manual_seed(0)
    expected = theirs([3, 999], GUIDANCE, generator, STEPS, output_type="np").images
    ours = model.images(solve(model.given(torch.tensor([3, 999]), GUIDANCE), state(model)))
    assert_close((ours / 2 + 0.5).clamp(0, 1), torch.from_numpy(expected).movedim(-1, 1))
    assert model.classes[:3] == ("tench", "goldfish", "2")
    assert len(model.classes) == 1000


def test_images_without_a_class_are_those_of_the_null_class(read: Any) -> None:
    model = read("dit")
    u, t = state(model), torch.tensor([100.0, 900.0])
    assert torch.equal(model.module(u, t), model.module(u, t, torch.tensor([1000, 1000])))
    assert not torch.equal(model.module(u, t), model.module(u, t, torch.tensor([1, 1000])))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_autoencoders_both_ways(kind: str, pipe: Any, read: Any) -> None:
    """As the pipelines scale and shift latents, and for images with the mode instead of a draw."""
    theirs, model = pipe(kind)[0], read(kind)
    autoencoder = theirs.vqvae if kind == "ldm" else theirs.vae
    scale, shift = autoencoder.config.scaling_factor, autoencoder.config.shift_factor or 0.0
    if kind.startswith("sdxl"):
        deviation, shift = (
            torch.tensor(values).view(1, 4, 1, 1)
            for values in (autoencoder.config.latents_std, autoencoder.config.latents_mean)
        )
        scale = scale / deviation
    latents = state(model)
    images = autoencoder.decode(latents / scale + shift).sample
    assert_close(model.images(latents), images, 1e-5)
    assert images.shape[1:] == model.image_shape
    pixels = torch.rand(2, *model.image_shape) * 2 - 1
    assert_close(model.latents(pixels), (autoencoder.encode(pixels).latent_dist.mode() - shift) * scale, 1e-5)
    assert torch.equal(model.latents(pixels)[1:], model.latents(pixels[1:]))


# -- as models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TEXTS)
def test_prompts_matter_and_none_is_the_empty_one(kind: str, read: Any) -> None:
    model = read(kind)
    plan = ddim(model.process, grid.default(model.process, 2, **model.grid))
    images = pf.Diffusion(model, plan).sample(2)
    assert images.shape == (2, *model.image_shape)

    def drawn(prompts: list[str], guidance: float = 1.0, negative: str = "") -> Tensor:
        told = dataclasses.replace(model, negative=negative).given(prompts, guidance)
        return run(plan, told.denoiser, state(model))

    empty, first, second = (drawn([prompt] * 2) for prompt in ("", "a fox", "sea"))
    assert torch.equal(run(plan, model.given(None).denoiser, state(model)), empty)
    guided, away = drawn(["sea"] * 2, 3.0), drawn(["sea"] * 2, 3.0, "a fox")
    for one, other in ((empty, first), (first, second), (second, guided), (guided, away)):
        assert (one - other).abs().max() > 1e-4 * one.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_batch_is_loop(kind: str, read: Any) -> None:
    """Rows of a batch do not see one another: 1e-5 of rounding."""
    model = read(kind)
    conditions = torch.tensor([5, 7]) if kind == "dit" else PROMPTS
    both = solve(model.given(conditions, GUIDANCE), state(model))
    for k in range(2):
        alone = solve(model.given(conditions[k : k + 1], GUIDANCE), state(model)[k : k + 1])
        assert_close(both[k : k + 1], alone, 1e-5)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_words_that_are_cut_are_named(kind: str, read: Any) -> None:
    """Nine tokens, two of them special, leave seven letters."""
    lost = "reads 7 tokens of the prompt 'one red house, old', but not: ouse ?, old"
    with pytest.warns(UserWarning, match=f"CLIPTextModel.* {lost}"):
        read(kind).given(["one red house, old"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(kind).given(["one red"])


def test_prompts_are_encoded_once(pipe: Any) -> None:
    text = diffusers_model(pipe("sd")[1]).text
    calls = []
    text.towers[0].encoder.register_forward_hook(lambda *_: calls.append(1))
    first = text(PROMPTS)
    assert all(torch.equal(*pair) for pair in zip(text(PROMPTS), first, strict=True))
    assert torch.equal(text(PROMPTS[1:])[0], first[0][1:])
    assert len(calls) == 2
    text([f"fox {k}" for k in range(KEPT)])
    text(PROMPTS[:1])
    assert len(calls) == KEPT + 3
    assert len(text._kept) == KEPT


@pytest.mark.parametrize("kind", ["sd", "sdxl", "ldm", "dit", "sd3", "flux"])
def test_half_weights(kind: str, pipe: Any, read: Any) -> None:
    """States stay in float32; 8 bits of a bfloat16 weight are 0.4% each, and there are dozens of layers."""
    model = diffusers_model(pipe(kind)[1], dtype=torch.bfloat16, size=read(kind).image_shape[1:])
    assert {p.dtype for p in model.module.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.decoder.parameters()} == {torch.bfloat16}
    if kind != "dit":
        assert {p.dtype for p in model.text.parameters()} == {torch.bfloat16}
    conditions = torch.tensor([5, 7]) if kind == "dit" else PROMPTS
    ours, exact = (solve(m.given(conditions), state(model)) for m in (model, read(kind)))
    assert ours.dtype == torch.float32
    assert 0 < (ours - exact).abs().max() < 0.1 * exact.abs().max()
    assert model.latents(torch.zeros(1, *model.image_shape)).dtype == torch.float32


@pytest.mark.parametrize(("upcast", "expected"), [(True, torch.float32), (False, torch.float16)])
def test_autoencoders_that_overflow_stay_in_single(upcast: bool, expected: torch.dtype, copy: Any) -> None:
    folder = copy("sdxl")
    edit(folder / "vae" / "config.json", force_upcast=upcast)
    model = diffusers_model(folder, dtype=torch.float16)
    assert {p.dtype for p in model.decoder.parameters()} == {expected}
    assert {p.dtype for p in model.module.parameters()} == {torch.float16}


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux"])
def test_other_sizes(kind: str, pipe: Any) -> None:
    """The images' size and, where it is told to the network or moves its grid, that too."""
    theirs, folder = pipe(kind)
    model = diffusers_model(folder, size=(16, 8))
    assert (model.shape, model.image_shape) == ((4, 8, 4), (3, 16, 8))
    start = state(model)
    settings: dict[str, Any] = {"num_inference_steps": STEPS, "height": 16, "width": 8, "output_type": "latent"}
    if kind == "flux":
        packed = theirs._pack_latents(start, 2, 4, 8, 4)
        expected = theirs._unpack_latents(theirs(PROMPTS, latents=packed, **settings).images, 16, 8, 2)
    else:
        expected = theirs(PROMPTS, latents=start, guidance_scale=1.0, **settings).images
    assert_close(solve(model.given(PROMPTS), start), expected)


def test_embedded_guidance(pipe: Any) -> None:
    """Told to networks distilled for it, and to no others."""
    for kind, told in (("flux", True), ("schnell", False)):
        theirs, folder = pipe(kind)
        models = [diffusers_model(folder, size=8, embedded_guidance=g) for g in (3.5, 1.0)]
        images = [solve(model.given(PROMPTS), state(model)) for model in models]
        assert torch.equal(*images) != told
        packed = theirs._pack_latents(state(models[0]), 2, 4, 4, 4)
        settings = {"num_inference_steps": STEPS, "height": 8, "width": 8, "output_type": "latent"}
        expected = theirs(PROMPTS, guidance_scale=1.0, latents=packed, **settings).images
        assert_close(images[1], theirs._unpack_latents(expected, 8, 8, 2))


def test_dynamic_shifts_of_stable_diffusion_3(copy: Any, pipe: Any) -> None:
    """That pipeline leaves the times to its scheduler, as Flux' does not."""
    folder, changes = copy("sd3"), {"use_dynamic_shifting": True, "base_image_seq_len": 1, "max_image_seq_len": 9}
    edit(folder / "scheduler" / "scheduler_config.json", **changes)
    model = diffusers_model(folder)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**changes)
    scheduler.set_timesteps(STEPS, mu=0.5 + (1.15 - 0.5) * (4 - 1) / (9 - 1))
    times = grid.default(model.process, STEPS, **model.grid)
    torch.testing.assert_close(times, scheduler.sigmas.double(), rtol=1e-6, atol=1e-7)


def test_a_transformer_under_its_old_name(copy: Any, read: Any) -> None:
    folder = copy("dit")
    edit(folder / "transformer" / "config.json", _class_name="Transformer2DModel", norm_type="ada_norm_zero")
    model, u = diffusers_model(folder), state(read("dit"))
    assert torch.equal(model.module(u, torch.ones(2)), read("dit").module(u, torch.ones(2)))


@pytest.mark.parametrize("pickled", [(), ("text_encoder",), ("text_encoder", "transformer", "vae")])
def test_hub(pickled: tuple[str, ...], copy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Any) -> None:
    """The files that a model is made of are fetched, and no others: half copies, other frameworks, pickled ones."""
    import huggingface_hub

    origin, cached = copy("sd3"), tmp_path / "cache"
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        weights = next((origin / part).glob("*.safetensors"))
        bin_name = "pytorch_model.bin" if part.startswith("text") else "diffusion_pytorch_model.bin"
        torch.save(load_file(weights), origin / part / bin_name)
        weights.with_suffix(".fp16.safetensors").write_bytes(b"")
        (origin / part / "flax_model.msgpack").write_bytes(b"")
        if part in pickled:
            weights.unlink()
    (origin / "sd3.safetensors").write_bytes(b"")
    rounds = []

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        rounds.append(name)
        files = [str(path.relative_to(origin)) for path in origin.rglob("*") if path.is_file()]
        for file in huggingface_hub.utils.filter_repo_objects(files, allow_patterns=allow_patterns):
            (cached / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(origin / file, cached / file)
        return str(cached)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = pf.load("someone/model")
    assert len(rounds) == 1 + bool(pickled)
    u = state(model)
    assert torch.equal(solve(model.given(PROMPTS), u), solve(read("sd3").given(PROMPTS), u))
    fetched = [path for path in cached.rglob("*") if path.is_file()]
    assert not [path for path in fetched if "fp16" in path.name or path.suffix == ".msgpack"]
    assert {path.parent.name for path in fetched if path.suffix == ".bin"} == set(pickled)
    assert not (cached / "sd3.safetensors").exists()


# -- errors ---------------------------------------------------------------------------------------------------------


def lose(part: str, *names: str) -> Callable[[Path], object]:
    """A folder without a part, in its index as well where that is named."""

    def damage(folder: Path) -> None:
        shutil.rmtree(folder / part)
        if names:
            edit(folder / "model_index.json", **{name: [None, None] for name in names})

    return damage


def change(part: str, **changes: Any) -> Callable[[Path], object]:
    return lambda folder: edit(folder / part / "config.json", **changes)


def rename(part: str, cls: str) -> Callable[[Path], object]:
    return lambda folder: edit(folder / "model_index.json", **{part: ["transformers", cls]})


def write(content: bytes, *files: str) -> Callable[[Path], object]:
    return lambda folder: [path.write_bytes(content) for file in files for path in folder.glob(file)]


def strip(folder: Path) -> None:
    (folder / "model_index.json").unlink()
    shutil.copytree(folder / "unet", folder, dirs_exist_ok=True)


PIXART, OLD = "PixArtTransformer2DModel", "Transformer2DModel"
FAULTS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no text encoder": ("sd", lose("text_encoder", "text_encoder"), "StableDiffusionPipeline, has no text_encoder"),
    "no folder": ("sd", lose("text_encoder"), "no text_encoder/config.json"),
    "no tokenizer": ("sd", lose("tokenizer"), "has no tokenizer"),
    "no weights": ("sdxl", lambda f: (f / "text_encoder_2/model.safetensors").unlink(), "_2 lacks its weights"),
    "short weights": ("sd3", write(b"1234", "text_encoder_3/model.safetensors"), "T5EncoderModel .* cannot be read"),
    "deeper": ("sd", change("text_encoder", num_hidden_layers=4), "lack .* of the network's tensors"),
    "spoilt tokenizer": ("sd", write(b"{", "tokenizer/*.json"), "CLIPTokenizer .* cannot be read"),
    "another encoder": ("sd", rename("text_encoder", "ChatGLMModel"), "ChatGLMModel; for a StableDiffusionPipeline"),
    "another network": ("dit", change("transformer", _class_name=PIXART), "PixArtTransformer2DModel; only"),
    "no network": ("dit", lose("transformer", "transformer"), "a DiTPipeline, has no unet or transformer"),
    "old transformer": ("dit", change("transformer", _class_name=OLD, norm_type="x"), "norm_type 'x'"),
    "consistency": ("sd", change("unet", time_cond_proj_dim=8), "time_cond_proj_dim 8"),
    "upscaler": ("sd", change("unet", num_class_embeds=10), "num_class_embeds 10"),
    "refiner": ("sdxl", lambda f: edit(f / "model_index.json", requires_aesthetics_score=True), "is a refiner"),
    "alone": ("sd", strip, "is a UNet2DConditionModel alone"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "damage", "message"), FAULTS.values(), ids=FAULTS)
def test_faults_are_told_in_a_sentence(kind: str, damage: Any, message: str, copy: Any) -> None:
    folder = copy(kind)
    damage(folder)
    with pytest.raises(pf.PushforwardError, match=message) as caught:
        diffusers_model(folder)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    assert len(text) < 1200


def test_pipelines_that_draw_with_more_are_refused(pipe: Any, tmp_path: Path) -> None:
    """Made by diffusers: a ControlNet, an adapter, perturbed attention; each with the network that can be read."""
    parts = {name: part for name, part in pipe("sd")[0].components.items() if name != "image_encoder"}
    more = {"adapter": diffusers.T2IAdapter(channels=[4, 8], num_res_blocks=1, adapter_type="light_adapter")}
    more["controlnet"] = diffusers.ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(4, 8))
    more["nothing"] = {}
    made = {
        "controlnet": (diffusers.StableDiffusionControlNetPipeline, r"controlnet \(ControlNetModel\)"),
        "adapter": (diffusers.StableDiffusionAdapterPipeline, r"adapter \(T2IAdapter\)"),
        "nothing": (
            diffusers.StableDiffusionPAGPipeline,
            "is a StableDiffusionPAGPipeline; for a UNet2DConditionModel",
        ),
    }
    for name, (cls, message) in made.items():
        extra = {name: more[name]} if more[name] else {}
        cls(**parts, **extra, requires_safety_checker=False).save_pretrained(tmp_path / name)
        with pytest.raises(pf.PushforwardError, match=message):
            diffusers_model(tmp_path / name)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("sd", {"_class_name": "StableDiffusionImg2ImgPipeline", "safety_checker": ["a", "B"]}, None),
        ("flux", {"_class_name": "FluxImg2ImgPipeline"}, None),
        ("sd", {"image_encoder": ["transformers", "CLIPVisionModelWithProjection"]}, "image_encoder"),
        ("sd", {"transformer": ["diffusers", "FluxTransformer2DModel"]}, "transformer"),
        ("sd", {"_class_name": ["mine", "MyPipeline"]}, "MyPipeline"),
        ("dit", {"text_encoder": ["transformers", "T5EncoderModel"]}, "text_encoder"),
        ("sd3", {"controlnet": ["diffusers", "SD3ControlNetModel"]}, "controlnet"),
        ("flux", {"_class_name": "FluxKontextPipeline"}, "FluxKontextPipeline"),
        ("sdxl", {"_class_name": "StableDiffusionXLInstructPix2PixPipeline"}, "Pix2Pix"),
    ],
    ids=str,
)
def test_only_what_is_run_is_drawn(kind: str, changes: dict[str, Any], message: str | None, copy: Any) -> None:
    folder = copy(kind)
    edit(folder / "model_index.json", **changes)
    if message is None:
        diffusers_model(folder)
        return
    with pytest.raises(pf.PushforwardError, match=message):
        diffusers_model(folder)


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "in pieces"])
def test_half_weights_alone_are_read(cut: bool, pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `variant="fp16"` saves them; also from the hub, where they are asked for only if there are no others."""
    import huggingface_hub

    theirs = copy_module.deepcopy(pipe("sd")[0]).to(torch.float16)
    theirs.save_pretrained(tmp_path / "half", variant="fp16", max_shard_size="9KB" if cut else "10GB")
    names = [path.name for path in (tmp_path / "half").rglob("*.safetensors")]
    assert all(".fp16" in name for name in names)
    assert any("-of-" in name for name in names) == cut
    model = diffusers_model(tmp_path / "half")
    assert {p.dtype for p in model.module.parameters()} == {torch.float32}
    ours, half = model.module.unet.state_dict(), theirs.unet.state_dict()
    assert all(torch.equal(ours[name], value.float()) for name, value in half.items())

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        files = [str(path.relative_to(tmp_path / "half")) for path in (tmp_path / "half").rglob("*") if path.is_file()]
        for file in huggingface_hub.utils.filter_repo_objects(files, allow_patterns=allow_patterns):
            (tmp_path / "cache" / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tmp_path / "half" / file, tmp_path / "cache" / file)
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    again = pf.load("someone/model").module.unet.state_dict()
    assert all(torch.equal(again[name], value) for name, value in ours.items())


def test_which_of_several_weights_is_read(copy: Any) -> None:
    """Plain ones, then fp16, then bf16, then the only one there is."""
    folder = copy("sd") / "unet"
    plain = folder / "diffusion_pytorch_model.safetensors"
    odd, half = (folder / f"diffusion_pytorch_model.{name}.safetensors" for name in ("non_ema", "fp16"))
    shutil.copy(plain, half)
    odd.write_bytes(b"")
    diffusers_model(folder.parent)
    plain.unlink()
    diffusers_model(folder.parent)
    half.rename(odd)
    diffusers_model(folder.parent)
    (folder / "diffusion_pytorch_model.ema.safetensors").write_bytes(b"")
    with pytest.raises(pf.PushforwardError, match="variants ema, non_ema and no plain ones"):
        diffusers_model(folder.parent)


def test_a_network_that_needs_another_image(copy: Any) -> None:
    folder = copy("sd")
    unet(in_channels=9).save_pretrained(folder / "unet")
    with pytest.raises(pf.PushforwardError, match="takes 9 channels and gives 4"):
        diffusers_model(folder)


def test_sizes_that_there_are_not(pipe: Any) -> None:
    for kind, size, message in (
        ("sd", 7, "multiples of 2 pixels; got 7"),
        ("flux", (8, 10), r"multiples of 4 pixels; got \(8, 10\)"),
        ("sd3", 28, "at most 24 pixels per side; got 28"),
    ):
        with pytest.raises(pf.PushforwardError, match=message):
            diffusers_model(pipe(kind)[1], size=size)


def test_networks_that_were_told_nothing(read: Any) -> None:
    with pytest.raises(pf.PushforwardError, match=r"model\.given\(prompts\)"):
        solve(read("sd"), state(read("sd")))


def test_without_transformers(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pipe("sd")[1]
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(pf.PushforwardError, match=r"transformers: pip install 'pushforward\[diffusers\]'"):
        pf.load(folder)
