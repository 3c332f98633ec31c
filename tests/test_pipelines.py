"""Pipelines of `diffusers` as models, against the pipelines themselves.

All have random weights and are written by the tests, tokenizers included. Both sides run in float32, where the
schedulers' tables differ from ours by 1e-5; guidance of 3 and four steps make that at most 1e-4 of the largest value.
"""

import copy as copy_module
import dataclasses
import logging
import shutil
import sys
from collections.abc import Callable
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
from pushforward.model.diffusers.calls import KEPT
from pushforward.model.diffusers.load import diffusers_model
from pushforward.plan import ddim, grid
from support.models import edit
from support.pipelines import (
    dit,
    flux,
    latent_diffusion,
    stable_diffusion,
    stable_diffusion_3,
    stable_diffusion_xl,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),  # of diffusers
]

CLOSE = 1e-4
STEPS, GUIDANCE = 4, 3.0
PROMPTS = ["a fox", "the red house by the sea, at night"]  # the second is cut: the tokenizer takes nine tokens
TEXTS = ["sd", "sd-v", "sdxl", "sdxl-one", "ldm", "sd3", "sd3-no-t5", "flux", "schnell"]
KINDS = [*TEXTS, "dit"]
FLUX = ("flux", "schnell")  # its states are packed: squares of 2 x 2 as tokens


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


def state(model: Model, count: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(model.state_shape(count), generator=torch.Generator().manual_seed(seed))


def solve(model: Model, start: Tensor) -> Tensor:
    return run(ddim(model.process, grid.default(model.process, STEPS, **model.grid)), model.denoiser, start)


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = CLOSE) -> None:
    assert ours.shape == theirs.shape
    error, size = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    assert error <= tolerance * max(size, 1), f"{error:.2e} of {size:.2e}"


# -- against the pipelines ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "negative"),
    [(kind, negative) for kind in TEXTS for negative in ("", "blurry") if (kind, negative) != ("ldm", "blurry")],
)
def test_images_are_the_pipelines(kind: str, negative: str, pipe: Any, read: Any) -> None:
    """Guided, from the same latents, by DDIM or, for flow matching, Euler. (LDM's has no negative prompts.)"""
    theirs, folder = pipe(kind)
    settings: dict[str, Any] = {"num_inference_steps": STEPS, "output_type": "np" if kind == "ldm" else "latent"}
    if kind in FLUX:
        extra = {"true_cfg_scale": GUIDANCE, "negative_prompt": negative}
        model = diffusers_model(folder, size=8, call=extra).given(PROMPTS)
        settings |= {**extra, "height": 8, "width": 8, "negative_prompt": [negative] * 2}
    else:
        model = dataclasses.replace(read(kind), negative=negative).given(PROMPTS, GUIDANCE)
        settings |= {"guidance_scale": GUIDANCE, **({"negative_prompt": [negative] * 2} if negative else {})}
    ours = solve(model, state(model))
    expected = theirs(PROMPTS, latents=state(model), **settings).images
    if kind == "ldm":
        ours, expected = (model.images(ours) / 2 + 0.5).clamp(0, 1), torch.from_numpy(expected).movedim(-1, 1)
    assert_close(ours, expected)


def test_images_by_class_are_the_pipelines(pipe: Any, read: Any) -> None:
    theirs, model = pipe("dit")[0], read("dit")
    generator = torch.Generator().manual_seed(0)
    expected = theirs([3, 999], GUIDANCE, generator, STEPS, output_type="np").images
    ours = model.images(solve(model.given(torch.tensor([3, 999]), GUIDANCE), state(model)))
    assert_close((ours / 2 + 0.5).clamp(0, 1), torch.from_numpy(expected).movedim(-1, 1))
    assert model.classes[:3] == ("tench", "goldfish", "2")
    assert len(model.classes) == 1000


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
    whole = theirs._unpack_latents(latents, 8, 8, 2) if kind in FLUX else latents
    images = autoencoder.decode(whole / scale + shift).sample
    assert_close(model.images(latents), images, 1e-5)
    assert images.shape[1:] == model.image_shape
    pixels = torch.rand(2, *model.image_shape) * 2 - 1
    found = (autoencoder.encode(pixels).latent_dist.mode() - shift) * scale
    assert_close(model.latents(pixels), theirs._pack_latents(found, 2, 4, 4, 4) if kind in FLUX else found, 1e-5)
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
    assert torch.equal(run(plan, model.given(None, 1.0).denoiser, state(model)), empty)
    pairs = [(empty, first), (first, second)]
    if kind != "schnell":
        pairs.append((second, drawn(["sea"] * 2, 3.0)))
    if kind not in ("ldm", *FLUX):
        pairs.append((pairs[-1][1], drawn(["sea"] * 2, 3.0, "a fox")))
    for one, other in pairs:
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


@pytest.mark.parametrize("kind", ["sd", "sd3", "flux", "dit"])
def test_several_prompts_are_asked_about_in_one_call(kind: str, read: Any) -> None:
    model = read(kind)
    call = model.module.call
    network = call.pipe.components[next(iter(call.denoisers))]
    told = model.given(torch.tensor([5, 7]) if kind == "dit" else PROMPTS, GUIDANCE)
    calls: list[int] = []
    handle = network.register_forward_hook(lambda *_: calls.append(1))
    solve(told, state(model))
    handle.remove()
    assert len(calls) == STEPS


def test_prompts_are_encoded_once(pipe: Any) -> None:
    model = diffusers_model(pipe("sd")[1])
    calls: list[int] = []
    next(model.module.call.pipe.text_encoder.children()).register_forward_hook(lambda *_: calls.append(1))
    first = solve(model.given(PROMPTS, 1.0), state(model))
    assert len(calls) == 2
    assert torch.equal(solve(model.given(PROMPTS, 1.0), state(model)), first)
    assert len(calls) == 2
    assert len(model.module.call.kept) <= KEPT


def test_what_diffusers_says_of_a_prompt_is_said_once(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    """That words were cut, in the first of all the calls with them; between calls it says what it likes."""
    model = diffusers_model(pipe("sd")[1])
    said = logging.getLogger("diffusers")
    said.addHandler(caplog.handler)
    try:
        for prompt in ("fox " * 90, "hen " * 90, "fox " * 90):
            solve(model.given([prompt] * len(PROMPTS), 1.0), state(model))
            said.warning("and what else there is, between the calls")
    finally:
        said.removeHandler(caplog.handler)
    lines = [record.getMessage() for record in caplog.records]
    assert sum("fox fox" in line for line in lines) == 1
    assert sum("hen hen" in line for line in lines) == 1
    assert sum("between the calls" in line for line in lines) == 3


@pytest.mark.parametrize("kind", ["sd", "sdxl", "ldm", "dit", "sd3", "flux"])
def test_half_weights(kind: str, pipe: Any, read: Any) -> None:
    """States stay in float32; 8 bits of a bfloat16 weight are 0.4% each, and there are dozens of layers."""
    model = diffusers_model(pipe(kind)[1], dtype=torch.bfloat16, size=8 if kind in FLUX else None)
    assert {p.dtype for p in model.module.parameters()} == {torch.bfloat16}
    parts = [part for part in model.module.call.pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.bfloat16}
    conditions = torch.tensor([5, 7]) if kind == "dit" else PROMPTS
    ours, exact = (solve(m.given(conditions), state(model)) for m in (model, read(kind)))
    assert ours.dtype == torch.float32
    assert 0 < (ours - exact).abs().max() < 0.1 * exact.abs().max()
    assert model.latents(torch.zeros(1, *model.image_shape)).dtype == torch.float32


def test_autoencoders_that_overflow_work_in_single(pipe: Any, read: Any) -> None:
    """As the pipeline has it: its weights are float16, but not while it works."""
    model = diffusers_model(pipe("sdxl")[1], dtype=torch.float16)
    vae, met = model.module.call.pipe.vae, set()
    vae.decoder.register_forward_pre_hook(lambda _, args: met.add(args[0].dtype))
    assert_close(model.images(state(model)), read("sdxl").images(state(model)), 0.01)
    assert met == {torch.float32}
    assert {p.dtype for p in vae.parameters()} == {torch.float16}


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux"])
def test_other_sizes(kind: str, pipe: Any) -> None:
    """The images' size and, where it is told to the network or moves its grid, that too."""
    theirs, folder = pipe(kind)
    model = diffusers_model(folder, size=(16, 8))
    assert (model.shape, model.image_shape) == ((8, 16) if kind == "flux" else (4, 8, 4), (3, 16, 8))
    settings = {"num_inference_steps": STEPS, "height": 16, "width": 8, "output_type": "latent"}
    expected = theirs(PROMPTS, latents=state(model), **settings).images
    assert_close(solve(model.given(PROMPTS), state(model)), expected)


def test_embedded_guidance(pipe: Any, read: Any) -> None:
    """Told to networks distilled for it, and to no others."""
    for kind, told in (("flux", True), ("schnell", False)):
        theirs, model = pipe(kind)[0], read(kind)
        images = [solve(model.given(PROMPTS, weight), state(model)) for weight in (None, 3.5, 1.0)]
        assert torch.equal(*images[:2])
        assert torch.equal(*images[1:]) != told
        settings = {"num_inference_steps": STEPS, "height": 8, "width": 8, "output_type": "latent"}
        assert_close(images[2], theirs(PROMPTS, guidance_scale=1.0, latents=state(model), **settings).images)


def test_the_weight_of_guidance_is_known(pipe: Any, read: Any) -> None:
    """And the default sampler goes by it; where a pipeline takes none, a weight of 1 says so."""
    unet = diffusers.UNet2DModel(sample_size=8, block_out_channels=(8,), norm_num_groups=4,
                                 down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))  # fmt: skip
    without = pf.from_pipeline(diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()))
    told = pf.from_pipeline(pipe("sd")[0], prompt=PROMPTS[0])
    assert [read("sd").guidance, read("sd").given(PROMPTS, 2).guidance, told.guidance, without.guidance] == [
        7.5,
        2,
        7.5,
        1,
    ]
    assert torch.equal(without.sample(1, steps=2, guidance=1), without.sample(1, steps=2))
    with pytest.raises(pf.PushforwardError, match="DDPMPipeline takes no guidance; leave it out"):
        without.sample(1, steps=2, guidance=2)
    for model, guidance, order in ((told, None, 1), (told, 1, 2), (without, None, 2)):
        assert model.diffusion("auto", 12, guidance=guidance).plan.settings["order"] == order


def test_dynamic_shifts_of_stable_diffusion_3(copy: Any, pipe: Any) -> None:
    """They depend on the size of the images."""
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
    edit(folder / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
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
    assert len(rounds) == 2 + bool(pickled)
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


FAULTS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no text encoder": ("sd", lose("text_encoder", "text_encoder"), "cannot be called with these arguments"),
    "no folder": ("sd", lose("text_encoder"), "no text_encoder/config.json"),
    "no tokenizer": ("sd", lose("tokenizer"), "has no tokenizer"),
    "no weights": ("sdxl", lambda f: (f / "text_encoder_2/model.safetensors").unlink(), "_2 lacks its weights"),
    "short weights": ("sd3", write(b"1234", "text_encoder_3/model.safetensors"), "T5EncoderModel .* cannot be read"),
    "deeper": ("sd", change("text_encoder", num_hidden_layers=4), "lack .* of the network's tensors"),
    "spoilt tokenizer": ("sd", write(b"{", "tokenizer/*.json"), "StableDiffusionPipeline .* cannot be read"),
    "another encoder": ("sd", rename("text_encoder", "OddModel"), "OddModel, which this version of transformers lacks"),
    "no network": ("dit", lose("transformer", "transformer"), "DiTPipeline cannot be called with"),
    "another pipeline": ("sd", lambda f: edit(f / "model_index.json", _class_name="Odd"), "is a Odd, which this"),
    "a pipeline of its own": (
        "sd", lambda f: edit(f / "model_index.json", _class_name=["mine", "MyPipeline"]), "MyPipeline.*from_pipeline",
    ),
    "scheduler": ("sd", lambda f: edit(f / "scheduler/scheduler_config.json", beta_schedule="odd"), "odd"),
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
    ours, half = model.module.call.pipe.unet.state_dict(), theirs.unet.state_dict()
    assert all(torch.equal(ours[name], value.float()) for name, value in half.items())

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        files = [str(path.relative_to(tmp_path / "half")) for path in (tmp_path / "half").rglob("*") if path.is_file()]
        for file in huggingface_hub.utils.filter_repo_objects(files, allow_patterns=allow_patterns):
            (tmp_path / "cache" / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tmp_path / "half" / file, tmp_path / "cache" / file)
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    again = pf.load("someone/model").module.call.pipe.unet.state_dict()
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


def test_sizes_that_there_are_not(pipe: Any) -> None:
    for kind, size, message in (
        ("sd", 7, "divisible by 8"),
        ("flux", (8, 10), r"makes images of 8x8 where it is asked for \(8, 10\)"),
        ("sd3", 64, "cannot be called with these arguments"),
    ):
        with pytest.raises(pf.PushforwardError, match=message):
            diffusers_model(pipe(kind)[1], size=size)


def test_without_transformers(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pipe("sd")[1]
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(pf.PushforwardError, match=r"transformers: pip install 'pushforward\[diffusers\]'"):
        pf.load(folder)
