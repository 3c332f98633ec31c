"""Pipelines of `diffusers` from folders, by name and from the command line: what they are called with acts."""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import pushforward as pf
from pushforward.execute import run
from pushforward.maps.storage import load_codes
from pushforward.model.contents import model_digest
from pushforward.plan import ddim, grid
from support.cli import invoke, refused
from support.pipelines import stable_diffusion, unet

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),  # of diffusers
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of pipelines: plain, with a control network, and from image to image."""
    torch.manual_seed(3)
    root = tmp_path_factory.mktemp("pipelines")
    plain = stable_diffusion(root)
    parts = {name: part for name, part in plain.components.items() if name != "image_encoder"}
    control = diffusers.ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(4, 8))
    for parameter in control.parameters():  # its last layers are zeros
        torch.nn.init.normal_(parameter, std=0.2)
    more = {"requires_safety_checker": False}
    made = {
        "plain": plain,
        "control": diffusers.StableDiffusionControlNetPipeline(**parts, controlnet=control, **more),
        "image": diffusers.StableDiffusionImg2ImgPipeline(**parts, **more),
    }
    for name, pipe in made.items():
        pipe.save_pretrained(root / name)
    return {name: root / name for name in made}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two pictures."""
    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for k in range(2):
        Image.fromarray(generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(root / f"{k}.png")
    return [root / f"{k}.png" for k in range(2)]


def drawn(folder: Path, out: Path, *options: Any) -> np.ndarray:
    """The picture that `pushforward sample` writes."""
    result = invoke("sample", folder, "--count", 1, "--steps", 3, "--solver", "ddim", "--out", out, "-q", *options)
    assert result.exit_code == 0, result.exception
    return np.asarray(Image.open(out)).astype(int)


# -- what a pipeline is called with ------------------------------------------------------------------------------------


def test_images_are_those_of_the_pipeline(folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the pipeline's own guidance where none is asked for, and with another."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folders["plain"])
    pipe.set_progress_bar_config(disable=True)
    model = pf.load(folders["plain"])
    assert model.info["source"] == str(folders["plain"])
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    settings = {"num_inference_steps": 3, "latents": latents, "output_type": "latent"}
    for weight in (None, 1.0, 3.0):
        plan = ddim(model.process, grid.default(model.process, 3, **model.grid))
        ours = run(plan, model.given(["a fox"], weight).denoiser, latents)
        theirs = pipe("a fox", **settings, **({} if weight is None else {"guidance_scale": weight})).images
        assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_networks_that_predict_by_edm(prediction: str, folders: Any) -> None:
    """Their v has the other sign."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folders["plain"])
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.EDMEulerScheduler(prediction_type=prediction)
    model = pf.from_pipeline(pipe)
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    theirs = pipe("a fox", num_inference_steps=3, latents=latents, output_type="latent").images
    plan = ddim(model.process, grid.default(model.process, 3, **model.grid))
    ours = run(plan, model.given(["a fox"]).denoiser, latents * pipe.scheduler.init_noise_sigma)
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_a_control_image_acts_and_is_needed(folders: Any, pictures: list[Path], tmp_path: Path) -> None:
    """A pipeline with a control network is never drawn without it."""
    refused(invoke("sample", folders["control"], "--count", 1, "--steps", 3), "image must be passed")
    images = [drawn(folders["control"], tmp_path / "a.png", "--control", path) for path in pictures]
    assert (images[0] != images[1]).any()
    same = drawn(folders["control"], tmp_path / "b.png", "--call", f"image={pictures[0]}")
    assert (same == images[0]).all()
    weak = drawn(folders["control"], tmp_path / "c.png", "--control", pictures[0],
                 "--call", "controlnet_conditioning_scale=0.1")  # fmt: skip
    assert (weak != images[0]).any()


def test_an_image_to_begin_with(folders: Any, pictures: list[Path], tmp_path: Path) -> None:
    image = drawn(folders["image"], tmp_path / "a.png", "--image", pictures[0])
    assert image.shape[2] == 3


def test_prompts_negative_prompts_and_guidance_are_the_pipelines(folders: Any, tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    fox = ("--prompt", "a fox")
    images = [
        drawn(folders["plain"], out, *fox, *more)
        for more in ((), ("--guidance", 1), ("--guidance", 7.5), ("--negative", "sea"), ("--call", "guidance_scale=1"))
    ]
    assert (images[0] == images[2]).all()  # its default
    assert (images[1] == images[4]).all()
    assert (images[0] != images[1]).any()
    assert (images[0] != images[3]).any()
    assert (images[0] == drawn(folders["plain"], out, "--call", "prompt=a fox")).all()


def test_sizes(folders: Any, tmp_path: Path, pictures: list[Path]) -> None:
    assert pf.load(folders["plain"], size=(16, 8)).image_shape == (3, 16, 8)
    with pytest.raises(pf.PushforwardError, match="takes no height and width"):
        pf.load(folders["image"], size=16, call={"image": pictures[0]})


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("plain", ["--call", "guidanc_scale=3"], "do you mean guidance_scale?"),
        ("plain", ["--call", "callback=1"], "own steps only"),
        ("plain", ["--call", "guidance_scale"], "an argument and its value"),
        ("plain", ["--control", "0.png"], "takes no control image"),
        ("plain", ["--image", "0.png"], "takes no argument 'image'"),
        ("plain", ["--size", "9"], "divisible by"),
        ("control", ["--control", "none.png"], "none.png is no image"),
        ("control", ["--control", "0.png", "--call", "image=0.png"], "takes no control image"),
        ("plain", ["--lora", "nowhere"], "The LoRA nowhere cannot be added"),
    ],
    ids=str,
)
def test_what_is_not_taken_is_refused_in_a_sentence(
    kind: str, options: list[str], message: str, folders: Any, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pictures[0].parent)
    refused(invoke("sample", folders[kind], "--count", 1, "--steps", 3, *options), message)


def test_models_of_the_package_take_no_call() -> None:
    refused(invoke("sample", "fashion-vp", "--call", "height=8"), "is no pipeline of diffusers, and takes no call")
    refused(invoke("sample", "fashion-vp", "--lora", "a"), "takes no LoRA")


# -- codes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["invert", "encode"])
def test_codes_say_what_the_pipeline_was_called_with(
    command: str, folders: Any, pictures: list[Path], tmp_path: Path
) -> None:
    """So they decode to the same images; with another control image, they say that they are of another model."""
    codes, out, report = tmp_path / "codes.safetensors", tmp_path / "out.png", tmp_path / "report.json"
    solver = ["--solver", "ddim", "--tolerance", 1e-3] if command == "invert" else ["--solver", "ddpm"]
    result = invoke(command, folders["control"], pictures[1], "--control", pictures[0], "--prompt", "a fox", *solver,
                    "--steps", 3, "--call", "guess_mode=false", "--out", codes, "--json", report, "-q")  # fmt: skip
    assert result.exit_code == 0, result.exception
    info = load_codes(codes)[1]
    assert info["call"] == {"image": str(pictures[0].resolve()), "guess_mode": False}
    assert info["guidance"] is None  # its own
    again = invoke("decode", codes, "--out", out, "--json", "-")
    assert again.exit_code == 0, again.exception
    assert json.loads(again.stdout)["notes"] == []


@pytest.mark.parametrize("command", ["invert", "encode", "translate", "evaluate"])
def test_the_default_weight_of_guidance_is_the_pipelines(
    command: str, folders: Any, pictures: list[Path], tmp_path: Path
) -> None:
    """As in `sample`: 7.5."""
    fox, few = ("--prompt", "a fox"), ("--steps", 2, "-q")
    np.savez(tmp_path / "data.npz", x_test=np.zeros((100, 8, 8, 3), np.uint8))
    arguments: dict[str, tuple[Any, ...]] = {
        "invert": (folders["plain"], pictures[0], *fox, *few, "--tolerance", 1, "--out"),
        "encode": (folders["plain"], pictures[0], *fox, *few, "--solver", "ddpm", "--out"),
        "translate": (pictures[0], "--source", folders["plain"], "--source-prompt", "a fox", "--target-prompt", "sea",
                      *few, "--out"),
        "evaluate": (folders["plain"], "--call", "prompt=a fox", "--data", tmp_path / "data.npz", "--split", "test",
                     "--solver", "ddim", *few,
                     "--converged", 2, "--count", 100, "--batch", 100, "--out"),
    }  # fmt: skip
    named = ("--source-guidance", "--target-guidance") if command == "translate" else ("--guidance",)

    def found(out: Path, weight: float | None = None) -> bytes:
        said = [] if weight is None else [word for name in named for word in (name, weight)]
        result = invoke(command, *arguments[command], out, *said)
        assert result.exit_code == 0, result.exception
        if out.is_dir():
            out = next(file for file in sorted(out.rglob("*.png" if command == "translate" else "*.safetensors")))
            return np.asarray(Image.open(out)).tobytes() if command == "translate" else out.read_bytes()
        code = load_codes(out)[0]
        return (code.start if code.noises is None else code.noises).numpy().tobytes()

    first = found(tmp_path / "a.safetensors")
    assert first == found(tmp_path / "b.safetensors", 7.5)
    assert first != found(tmp_path / "c.safetensors", 1)


def test_the_source_of_an_edit_is_encoded_without_guidance(folders: Any) -> None:
    """As by the command and in the paper."""
    model, images = pf.load(folders["plain"]), torch.zeros(1, 3, 8, 8)
    edited = model.edit(images, "a fox", "the sea", steps=2).images
    assert edited.equal(model.edit(images, "a fox", "the sea", steps=2, source_guidance=1.0).images)
    assert not edited.equal(model.edit(images, "a fox", "the sea", steps=2, source_guidance=7.5).images)


def test_digests_tell_what_acts(folders: Any, pictures: list[Path]) -> None:
    def digest(name: str = "control", image: int = 0, **call: Any) -> str:
        return model_digest(pf.load(folders[name], call={"control": pictures[image], **call}))

    first = digest()
    assert first == digest()
    others = [digest(image=1), digest(guidance_scale=3.0), digest(controlnet_conditioning_scale=0.5)]
    model = pf.load(folders["control"], call={"control": pictures[0]})
    others.append(model_digest(model.given(["a fox"], 2.0)))
    assert len({first, *others}) == 5


def test_digests_do_not_tell_the_place(folders: Any, tmp_path: Path) -> None:
    """A copy is the same model, but with other words it is another."""
    first, copy = pf.load(folders["plain"]), Path(shutil.copytree(folders["plain"], tmp_path / "copy"))
    assert model_digest(pf.load(copy)) == model_digest(first)
    vocabulary = copy / "tokenizer" / "tokenizer.json"
    vocabulary.write_text(vocabulary.read_text().replace('"a</w>"', '"A</w>"'))
    assert model_digest(pf.load(copy)) != model_digest(first)


# -- LoRA and checkpoints ----------------------------------------------------------------------------------------------


@pytest.fixture
def lora(folders: Any, tmp_path: Path) -> Path:
    """A folder with a LoRA for the plain pipeline."""
    import peft

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folders["plain"])
    torch.manual_seed(0)
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers = peft.get_peft_model_state_dict(pipe.unet)
    pipe.save_lora_weights(tmp_path / "lora", unet_lora_layers=layers)
    return tmp_path / "lora"


def test_lora_acts_by_its_weight(lora: Path, folders: Any, tmp_path: Path) -> None:
    plain, whole, half, none, file = (
        drawn(folders["plain"], tmp_path / "a.png", "--prompt", "a fox", *more)
        for more in ([], ["--lora", lora], ["--lora", f"{lora}:0.5"], ["--lora", f"{lora}:0"],
                     ["--lora", lora / "pytorch_lora_weights.safetensors"])
    )  # fmt: skip
    assert (plain != whole).any()
    assert (half != whole).any()
    assert (none == plain).all()
    assert (file == whole).all()
    models = [pf.load(folders["plain"], lora=one) for one in ((), lora, f"{lora}:0.5")]
    assert len({model_digest(model) for model in models}) == 3
    refused(invoke("sample", lora), "holds a LoRA alone")


def test_checkpoints_are_read_with_the_settings_beside_them(
    folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(folders["plain"], tmp_path / "model"))
    file = folder / "all.safetensors"
    shutil.copy(folder / "unet" / "diffusion_pytorch_model.safetensors", file)
    asked: list[tuple[str, str]] = []

    def from_single_file(path: str, *, config: str, **_: Any) -> Any:
        asked.append((path, config))
        return diffusers.StableDiffusionPipeline.from_pretrained(folder)

    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "from_single_file", from_single_file)
    assert pf.load(file).name == "all"
    assert asked == [(str(file), str(folder))]
    alone = Path(shutil.copy(file, tmp_path / "alone.safetensors"))
    with pytest.raises(pf.PushforwardError, match=r"is a checkpoint alone, .* cannot be fetched"):
        pf.load(alone)


def test_a_pipeline_around_a_network_with_more_channels_needs_its_image(folders: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["plain"], tmp_path / "model"))
    unet(in_channels=9).save_pretrained(folder / "unet")
    with pytest.raises(pf.PushforwardError, match="cannot be called with these arguments"):
        pf.load(folder)
