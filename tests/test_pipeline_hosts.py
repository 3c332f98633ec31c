"""Pipelines as models where the host differs: dtypes, offloading, compiled and stubborn weights, errors, threads.

Tiny random networks. A pipeline is asked in few calls of many rows; the reference are calls of one row each. Batches
round otherwise than single rows: to 1e-5 of the largest value in float32.
"""

import copy
import pickle
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch._dynamo.testing
from diffusers.hooks import group_offloading
from torch import Tensor, nn

import pushforward as pf
from support import modular
from support.pipelines import flux, stable_diffusion, stable_diffusion_xl

pytestmark = pytest.mark.usefixtures("one_thread")

CALL: dict[str, Any] = {"prompt": "a fox", "guidance_scale": 3.0, "height": 8, "width": 8}
PARTS = ("unet", "transformer", "vae", "text_encoder")


@pytest.fixture(params=[stable_diffusion, flux], ids=["unet", "transformer"])
def pipe(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return made(request.param, tmp_path)


def made(make: Callable[[Path], Any], folder: Path) -> Any:
    """A pipeline of random weights that matter: the last layers of tiny transformers are zeros."""
    torch.manual_seed(3)
    pipe = make(folder)
    for parameter in denoiser(pipe).parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return pipe


def denoiser(pipe: Any) -> Any:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def model_of(pipe: Any, **call: Any) -> pf.Model:
    return pf.from_pipeline(pipe, **{**CALL, **call})


def rows(model: pf.Model, count: int = 3) -> tuple[Tensor, Tensor]:
    """States at times from noise to data."""
    u = torch.randn(model.state_shape(count), generator=torch.Generator().manual_seed(1))
    return u, torch.linspace(0.9, 0.1, count, dtype=torch.float64) * model.process.t_max


def asked(model: pf.Model, count: int = 3) -> Tensor:
    """Answers to all rows at once."""
    u, t = rows(model, count)
    with torch.no_grad():
        return model.module(u, t)


def singly(model: pf.Model, count: int = 3) -> Tensor:
    """Answers to the same rows one by one."""
    with torch.no_grad():
        return torch.cat([model.module(u[None], t[None]) for u, t in zip(*rows(model, count), strict=True)])


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    assert ours.shape == theirs.shape
    assert bool(theirs.isfinite().all())
    ours, theirs = ours.detach(), theirs.detach()
    assert float((ours - theirs).abs().max()) <= tolerance * float(theirs.abs().max())


def inside(pipe: Any) -> dict[str, Any]:
    """What a pipeline and its parts hold, by identity, and the hooks of all their modules."""
    held: dict[str, Any] = {f"pipe.{name}": id(value) for name, value in vars(pipe).items()}
    held |= {"bar": dict(getattr(pipe, "_progress_bar_config", {})), "config": dict(pipe.config)}
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            held |= {f"{name}.{key}": id(value) for key, value in vars(part).items() if key != "_diffusers_hook"}
            held[f"{name} hooks"] = [
                list(hooks) for m in part.modules() for hooks in (m._forward_pre_hooks, m._forward_hooks)
            ]
            held[f"{name} weights"] = [(id(p), p.data_ptr(), p.dtype, p.device, p.grad) for p in part.parameters()]
        elif hasattr(part, "__dict__"):
            held |= {f"{name}.{key}": id(value) for key, value in vars(part).items()}
    return held


def use(model: pf.Model) -> None:
    images = model.sample(2, solver="ddim", steps=3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*further from the sequential ones")
        model.sample(1, solver="ddim", steps=3, parallel=True)
    model.latents(images)


# -- left as found --------------------------------------------------------------------------------------------------


def test_a_pipeline_is_left_as_found(pipe: Any) -> None:
    before = inside(pipe)
    use(model_of(pipe))
    assert inside(pipe) == before


def test_a_pipeline_that_was_used_is_left_as_found(pipe: Any) -> None:
    pipe.set_progress_bar_config(desc="mine")
    pipe(**CALL, num_inference_steps=2, output_type="latent")
    before = inside(pipe)
    use(model_of(pipe))
    assert inside(pipe) == before


def with_edm(folder: Path) -> Any:
    pipe = stable_diffusion(folder)
    pipe.scheduler = diffusers.EDMEulerScheduler()
    return pipe


@pytest.mark.parametrize("kind", ["unet", "transformer", "edm", "blocks"])
def test_a_model_is_copied_and_pickled_with_its_pipeline(kind: str, tmp_path: Path) -> None:
    """As it goes to another process: the copy makes the same images with a pipeline of its own."""
    if kind == "blocks":
        pipe, call = modular.stable_diffusion_xl(images=1)
    else:
        pipe, call = made({"unet": stable_diffusion, "transformer": flux, "edm": with_edm}[kind], tmp_path), CALL
    model = pf.from_pipeline(pipe, **call)
    images = model.sample(2, solver="ddim", steps=2)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.sample(2, solver="ddim", steps=2).equal(images)
        assert copied.module.call.pipe is not pipe  # type: ignore[union-attr]


def test_a_text_encoder_with_hooks_is_copied_and_not_pickled(tmp_path: Path) -> None:
    """As transformers hooks SDXL's, to hand out hidden states."""
    model = model_of(made(stable_diffusion_xl, tmp_path))
    images = model.sample(1, solver="ddim", steps=2)
    with pytest.raises(pf.PushforwardError, match="hooks on it; copy the model"):
        pickle.dumps(model)
    copied = copy.deepcopy(model)
    assert copied.sample(1, solver="ddim", steps=2).equal(images)
    assert copied.module.call.pipe is not model.module.call.pipe  # type: ignore[union-attr]


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("part", ["denoiser", "vae"])
def test_a_pipeline_is_left_as_found_by_errors(pipe: Any, part: str, error: type[BaseException]) -> None:
    """Of its network, or of its decoder: raised within, at a call in the middle."""
    model = model_of(pipe)
    layer = next(m for m in (denoiser(pipe) if part == "denoiser" else pipe.vae.decoder).modules() if is_leaf(m))
    calls = []

    def fails(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise error("made up")

    handle = layer.register_forward_pre_hook(fails)
    before = inside(pipe)
    expected = (error, pf.PushforwardError) if issubclass(error, Exception) else error
    with pytest.raises(expected, match="made up"):
        model.sample(2, solver="ddim", steps=3)
    handle.remove()
    after = inside(pipe)
    assert {k: v for k, v in after.items() if "hooks" not in k} == {k: v for k, v in before.items() if "hooks" not in k}
    assert not any(hooks for key, every in after.items() if key.endswith(" hooks") for hooks in every)
    assert_close(asked(model), singly(model))


def is_leaf(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv2d)


def test_out_of_memory_is_said_as_such(pipe: Any) -> None:
    """So that whoever chooses the rows of a round can take fewer."""
    model = model_of(pipe)

    def fails(*_: Any) -> None:
        raise torch.OutOfMemoryError("made up")

    denoiser(pipe).register_forward_pre_hook(fails)
    with pytest.raises(torch.OutOfMemoryError, match="made up"):
        asked(model)


# -- dtypes ---------------------------------------------------------------------------------------------------------


def test_half_precision(pipe: Any) -> None:
    """In bfloat16: rows as single calls, and near float32's, both to some roundings of 2^-8."""
    whole = asked(model_of(pipe))
    model = model_of(pipe.to(torch.bfloat16))
    assert model.module.rows.together == "times"
    answers = asked(model)
    assert answers.dtype == torch.float32
    assert_close(answers, singly(model), 0.02)
    assert_close(answers, whole, 0.1)
    before = inside(pipe)
    use(model)
    assert inside(pipe) == before
    assert {p.dtype for p in denoiser(pipe).parameters()} == {torch.bfloat16}


def test_an_autoencoder_that_needs_more(tmp_path: Path) -> None:
    """As SDXL's in float16: the pipeline widens it for its images, and we do for ours; it is half as wide again after.

    Its numbers between encoder layers overflow float16, so that images are finite only if it is widened.
    """
    pipe = made(stable_diffusion_xl, tmp_path).to(torch.float16)
    assert pipe.vae.config.force_upcast
    with torch.no_grad():
        pipe.vae.encoder.conv_in.weight.fill_(3e4)
        pipe.vae.decoder.conv_in.weight.mul_(3e3)
    model = model_of(pipe)
    images = model.sample(2, solver="ddim", steps=2)
    assert images.isfinite().all()
    assert model.encoder is not None
    assert model.latents(images).isfinite().all()
    assert {p.dtype for p in pipe.vae.parameters()} == {torch.float16}


def test_an_encoder_that_cannot_be_run_is_told_of_when_it_is_wanted(tmp_path: Path) -> None:
    pipe = made(stable_diffusion_xl, tmp_path)

    def fail(*_: Any, **__: Any) -> None:
        raise NotImplementedError("No kernel for this device.")

    pipe.vae.encode = fail
    model = model_of(pipe)
    images = model.sample(1, solver="ddim", steps=1)
    with pytest.raises(pf.PushforwardError, match="cannot be run: NotImplementedError, No kernel for this device"):
        model.latents(images)


# -- where weights are ----------------------------------------------------------------------------------------------


def offloaded(pipe: Any, way: str) -> None:
    """Offload a pipeline to where it works, as there is no other device: all that offloading puts on it is there."""
    if way == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    elif way == "group":
        pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    elif way == "tiling":
        pipe.vae.enable_tiling()
        pipe.vae.enable_slicing()


@pytest.mark.parametrize("way", ["model", "group", "tiling"])
def test_offloading(pipe: Any, way: str) -> None:
    """The same answers, images and latents, and it is offloaded as before, before and after the pipeline's own use."""
    model = model_of(pipe)
    wanted, images = asked(model), model.sample(2, solver="ddim", steps=2)
    latents = model.latents(images)
    own = called(pipe)
    offloaded(pipe, way)
    before = weights(pipe)
    model = model_of(pipe)
    for _ in range(2):
        assert weights(pipe) == before
        assert_close(asked(model), wanted)
        assert_close(model.sample(2, solver="ddim", steps=2), images)
        assert_close(model.latents(images), latents)
        assert_close(called(pipe), own)


def test_a_call_looks_once_for_how_a_part_is_offloaded(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`diffusers` does whenever it asks where to work, in all modules: as long as a small network takes to answer."""
    model, looked = model_of(pipe), []
    look = group_offloading._get_top_level_group_offload_hook

    def noted(part: nn.Module) -> Any:
        looked.append(part)
        return look(part)

    monkeypatch.setattr(group_offloading, look.__name__, noted)
    asked(model)
    assert looked
    assert len(looked) == len(set(looked))


@pytest.mark.parametrize("way", ["model", "group"])
def test_errors_while_offloaded(pipe: Any, way: str) -> None:
    """A network that fails within a call: the pipeline goes on as it did before."""
    own = called(pipe)
    offloaded(pipe, way)
    model = model_of(pipe)
    wanted, before = asked(model), weights(pipe)
    layer = next(m for m in denoiser(pipe).modules() if is_leaf(m))

    def fails(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = layer.register_forward_pre_hook(fails)
    with pytest.raises(KeyboardInterrupt):
        model.sample(2, solver="ddim", steps=2)
    handle.remove()
    assert weights(pipe) == before
    assert_close(asked(model), wanted)
    assert_close(called(pipe), own)


def called(pipe: Any) -> Tensor:
    """An image of the pipeline itself, in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    images: Tensor = pipe(**CALL, num_inference_steps=2, output_type="pt", generator=generator).images
    return images


def weights(pipe: Any) -> list[Any]:
    return [(p.dtype, p.device) for part in pipe.components.values() if isinstance(part, nn.Module)
            for p in part.parameters()]  # fmt: skip


def test_weights_that_are_cast_layer_by_layer(pipe: Any) -> None:
    """In 8 bits, of which a layer is widened while it runs; rows are single calls'."""
    denoiser(pipe).enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    before = weights(pipe)
    model = model_of(pipe)
    assert_close(asked(model), singly(model))
    use(model)
    assert weights(pipe) == before


def test_a_pipeline_on_a_device_map(tmp_path: Path) -> None:
    """As `from_pretrained(..., device_map=...)` leaves it: nothing of it may be moved."""
    made(stable_diffusion, tmp_path / "made").save_pretrained(tmp_path / "saved")
    wanted = asked(model_of(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved")))
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved", device_map="cpu")
    pipe.hf_device_map = {"unet": "cpu", "vae": "cpu", "text_encoder": "cpu"}
    with pytest.raises(ValueError, match="device map"):
        pipe.to("cpu")
    model = model_of(pipe)
    assert_close(asked(model), wanted)
    use(model)


class Stubborn(nn.Module):
    """Weights that cannot be moved, cast or copied, as those of quantised layers: 8 bits and a scale."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.scale = linear.weight.abs().max() / 127
        self.weight = nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)

    def _apply(self, *_: Any, **__: Any) -> Any:
        raise ValueError("weights of 8 bits cannot be moved")

    def __deepcopy__(self, _: Any) -> Any:
        raise ValueError("weights of 8 bits cannot be copied")

    __copy__ = __reduce_ex__ = __deepcopy__


def test_quantised_weights(pipe: Any) -> None:
    for module in list(denoiser(pipe).modules()):
        for name, layer in module.named_children():
            if (isinstance(layer, nn.Linear) and "attn" in name) or name in ("to_q", "to_k", "proj_mlp"):
                setattr(module, name, Stubborn(layer))
    assert any(isinstance(layer, Stubborn) for layer in denoiser(pipe).modules())
    before = inside(pipe)
    model = model_of(pipe)
    assert_close(asked(model), singly(model))
    use(model)
    assert inside(pipe) == before


@pytest.mark.parametrize("way", ["wrapped", "in place"])
def test_compiled_networks(pipe: Any, way: str) -> None:
    """By `torch.compile(network)` or `network.compile()`; no new code for further rounds of as many rows."""
    if hasattr(pipe, "unet"):
        pipe.unet = shallow()  # compiling takes seconds for each block
    wanted = asked(model_of(pipe))
    counter = torch._dynamo.testing.CompileCounter()
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    if way == "wrapped":
        setattr(pipe, name, torch.compile(denoiser(pipe), backend=counter))
    else:
        denoiser(pipe).compile(backend=counter)
    before = inside(pipe)
    model = model_of(pipe)
    assert_close(asked(model), wanted)
    count = counter.frame_count
    assert count > 0
    assert_close(asked(model), wanted)
    assert counter.frame_count == count
    model.sample(1, solver="ddim", steps=2)
    assert inside(pipe) == before


def shallow() -> Any:
    """A U-Net of one block on each side, between which nothing is asked about."""
    torch.manual_seed(3)
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    sizes = {"block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 2, "attention_head_dim": 2}
    return diffusers.UNet2DConditionModel(
        sample_size=4, **blocks, **sizes, cross_attention_dim=8, mid_block_type=None
    ).eval()


# -- threads --------------------------------------------------------------------------------------------------------


def test_threads_that_ask_at_once(pipe: Any) -> None:
    """Two models of a pipeline, made and asked in four threads; each has its own answers and images."""
    prompts = ["a fox", "the sea"]
    wanted = [images(pipe, prompt) for prompt in prompts] * 2
    before = inside(pipe)
    begin = threading.Barrier(len(wanted))

    def ask(prompt: str) -> Tensor:
        begin.wait()
        for _ in range(2):
            found = images(pipe, prompt)
        return found

    with ThreadPoolExecutor(len(wanted)) as pool:
        for found, right in zip(pool.map(ask, prompts * 2), wanted, strict=True):
            assert torch.equal(found, right)
    assert inside(pipe) == before


def images(pipe: Any, prompt: str) -> Tensor:
    return model_of(pipe, prompt=prompt).sample(2, solver="ddim", steps=2, seed=4)


def test_pipelines_that_share_a_network(tmp_path: Path) -> None:
    """Asked in two threads: what one puts on the network for a call is not there for the other."""
    first = made(stable_diffusion, tmp_path)
    second = type(first)(**first.components, requires_safety_checker=False)
    models = [model_of(first), model_of(second, prompt="the sea")]
    wanted = [asked(model) for model in models]
    begin = threading.Barrier(2)

    def ask(model: pf.Model) -> list[Tensor]:
        begin.wait()
        return [asked(model) for _ in range(10)]

    with ThreadPoolExecutor(2) as pool:
        for answers, right in zip(pool.map(ask, models), wanted, strict=True):
            assert all(torch.equal(one, right) for one in answers)
