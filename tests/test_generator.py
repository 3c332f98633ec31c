"""GANs, decoders and consistency models as maps from Gaussian codes: against networks built by hand, and diffusers.

Networks are tiny and have random weights. Where two ways of the same float32 computation are compared, they differ by
rounding that convolutions of other batch sizes order otherwise: 1e-5 of values of size 1.
"""

import importlib
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pushforward.errors import PushforwardError
from pushforward.maps.code import Code
from pushforward.maps.generator import consistency, gan, stylegan
from pushforward.maps.load import load_generator
from pushforward.maps.protocol import Pushforward
from support.models import tutorial

ROUNDING = 1e-5


class Toy(nn.Module):
    """Latents (count, 6) to images (count, 1, 4, 5) in [-1, 1]; classes move them."""

    def __init__(self, classes: int = 0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.last, self.norm = nn.Linear(6, 8), nn.Linear(8, 20), nn.BatchNorm1d(8)
        self.table = nn.Embedding(classes, 6) if classes else None

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.table is not None:
            z = z + self.table(labels)
        return self.last(self.norm(self.first(z)).tanh()).tanh().view(-1, 1, 4, 5)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- codes and priors -------------------------------------------------------------------------------------------------


def echo(size: int, prior: Any) -> Any:
    """A generator whose images are its latents."""
    return gan(lambda z: z.view(len(z), 1, 1, size), size, prior, dtype=torch.float64)


def test_the_uniform_prior_has_the_quantiles_of_the_normal():
    """2 Phi(z) - 1 at tabulated quantiles of the normal, to the ten digits of the table."""
    z = torch.tensor([[-1.9599639845, -0.6744897502, 0.0, 0.6744897502, 1.6448536270]], dtype=torch.float64)
    images = echo(5, "uniform").decode(Code(z))
    expected = torch.tensor([-0.95, -0.5, 0.0, 0.5, 0.9], dtype=torch.float64)
    torch.testing.assert_close(images.flatten(), expected, rtol=0, atol=1e-9)


def test_the_sphere_prior_keeps_directions_and_sets_the_radius():
    z = normal(7, 12).double()
    latents = echo(12, "sphere").decode(Code(z)).flatten(1)
    torch.testing.assert_close(latents.norm(dim=1), torch.full((7,), 12**0.5, dtype=torch.float64))
    torch.testing.assert_close(nn.functional.cosine_similarity(latents, z), torch.ones(7, dtype=torch.float64))


def test_a_prior_may_be_any_function_and_the_normal_one_does_nothing():
    z = normal(3, 4).double()
    assert torch.equal(echo(4, "normal").decode(Code(z)).flatten(1), z)
    assert torch.equal(echo(4, lambda z: 2 * z + 1).decode(Code(z)).flatten(1), 2 * z + 1)


def test_draws_are_standard_normal_and_each_image_has_its_own():
    """4000 draws: mean and variance have standard errors of 1/63 and 1/45, here taken four times."""
    toy = gan(Toy(), 6)
    code = toy.draw(4000 // 6, seed=5)
    assert code.noises is None
    assert abs(code.start.mean()) < 4 / 63
    assert abs(code.start.var() - 1) < 4 / 45
    assert torch.equal(toy.draw(3, seed=5, first=2).start, code.start[2:5])
    assert not torch.equal(toy.draw(3, seed=6).start, code.start[:3])


def test_images_depend_on_seed_and_number_alone():
    """Through a batch norm, which in training mode would mix the images of a batch."""
    toy = gan(Toy().train(), 6)
    assert isinstance(toy, Pushforward)
    images = toy.sample(7, seed=2)
    assert images.shape == (7, 1, 4, 5)
    torch.testing.assert_close(toy.sample(7, seed=2, batch=3), images, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(toy.sample(2, seed=2, first=4), images[4:6], rtol=0, atol=ROUNDING)
    torch.testing.assert_close(toy.decode(toy.draw(7, seed=2)[[5]]), images[[5]], rtol=0, atol=ROUNDING)
    assert (images[0] - images[1]).abs().max() > 0.01


@pytest.mark.parametrize("prior", ["normal", "uniform", "sphere"])
def test_gradients_in_the_code_are_those_of_finite_differences(prior):
    toy = gan(Toy().double(), 6, prior)
    z = normal(2, 6).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: toy.decode(Code(z)), z)


def test_labels_reach_the_network_and_a_range_is_brought_to_ours():
    net = Toy(classes=3)
    toy = gan(net, 6, classes=["a", "b", "c"])
    code, labels = toy.draw(3), torch.tensor([2, 0, 1])
    torch.testing.assert_close(toy.given(labels).decode(code), net(code.start, labels))
    torch.testing.assert_close(toy.given(labels).sample(3, batch=2), net(code.start, labels), rtol=0, atol=ROUNDING)
    assert (toy.given(labels).decode(code) - toy.given(labels.flip(0)).decode(code))[0].abs().max() > 0.01
    half = gan(lambda z: net(z, labels[: len(z)]) / 2 + 0.5, 6, range=(0, 1), image_shape=(1, 4, 5))
    torch.testing.assert_close(half.decode(code), net(code.start, labels), rtol=0, atol=1e-6)


def test_the_decoder_of_an_autoencoder_is_a_generator():
    """What it gives has the images as its `sample`; the network behind the method says dtype and device."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, layers_per_block=1).double()
    decoder = gan(vae.decode, (4, 4, 4))
    z = normal(2, 4, 4, 4)
    assert decoder.image_shape == (3, 4, 4)
    torch.testing.assert_close(decoder.decode(Code(z)), vae.decode(z.double()).sample)


# -- DCGAN ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "kernel", "grown", "side"), [((8, 1), 7, 4, 14), ((6, 6, 3), 4, 2, 16), ((4,) * 11 + (3,), 4, 1, 4)]
)
def test_a_dcgan_is_read_from_its_shapes(tmp_path, channels, kernel, grown, side):
    """Of two to twelve layers; those beyond the tenth, of equal widths, are in order only if numbers are counted."""
    net = tutorial(5, channels, kernel, grown=grown)
    path = tmp_path / "net.safetensors"
    save_file({f"main.{key}": value for key, value in net.state_dict().items()}, path)
    loaded = load_generator(path, prior="uniform")
    assert loaded.image_shape == (channels[-1], side, side)
    z = normal(3, 5)
    expected = net(torch.erf(z / 2**0.5)[..., None, None])
    torch.testing.assert_close(loaded.decode(Code(z)), expected, rtol=0, atol=ROUNDING)
    assert expected[0].std() > 0.01


def wrapped(state: dict[str, Tensor], form: str) -> dict[str, Any]:
    """Forms in which checkpoints are met."""
    judge = nn.Sequential(nn.Conv2d(3, 8, 4, 2, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 1, 4)).state_dict()
    prefix = {"data parallel": "module.main.", "lightning": "generator.net."}.get(form, "main.")
    named = {f"{prefix}{key}": value for key, value in state.items()}
    match form:
        case "pair":
            return {"epoch": 3, "netD_state_dict": judge, "netG_state_dict": named}
        case "ema":
            return {"G": {key: 0 * value for key, value in named.items()}, "D": judge, "G_ema": named}
        case "lightning":
            return {"state_dict": {**{f"discriminator.{key}": value for key, value in judge.items()}, **named}}
        case "words":  # names that do not count, in the order of the layers
            names = {"0": "initial.convt", "1": "initial.norm", "3": "final.convt"}
            return {f"main.{names[k]}.{field}": v for key, v in state.items() for k, field in [key.split(".")]}
    return named


@pytest.mark.parametrize("form", ["plain", "data parallel", "pair", "ema", "lightning", "words"])
def test_a_dcgan_is_found_in_its_checkpoint(tmp_path, form):
    net = tutorial(5, (8, 3), 4, bias=True)
    torch.save(wrapped(net.state_dict(), form), tmp_path / "net.pth")
    loaded = load_generator(tmp_path / "net.pth", (5, 1, 1))
    z = normal(2, 5, 1, 1)
    torch.testing.assert_close(loaded.decode(Code(z)), net(z), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({}, "it has no tensors"),
        ({"a.weight": torch.zeros(4, 3)}, r"layer 'a' \(weight \(4, 3\)\) is neither"),
        ({"0.weight": torch.zeros(5, 4, 4, 4), "1.weight": torch.zeros(9, 3, 4, 4)}, "does not follow on 4 channels"),
        ({"0.weight": torch.zeros(5, 4, 4, 4), "1.weight": torch.zeros(4, 3, 3, 3)}, "kernel of 3"),
        ({"0.weight": torch.zeros(5, 4, 4, 4), "1.weight": torch.zeros(4, 4, 4, 4)}, "makes 4 channels"),
        ({"0.weight": torch.zeros(5, 3, 4, 4)}, "two or more"),
        ({"0.weight": torch.zeros(5, 3, 4, 4), "1.gain": torch.zeros(3)}, "'1'"),
    ],
)
def test_other_checkpoints_are_refused(tmp_path, state, said):
    torch.save(state, tmp_path / "net.pt")
    with pytest.raises(PushforwardError, match=said) as caught:
        load_generator(tmp_path / "net.pt")
    assert "net.pt is no DCGAN generator" in str(caught.value)


# -- TorchScript, StyleGAN --------------------------------------------------------------------------------------------


def test_torchscript_is_a_generator_once_it_is_told_its_latents(tmp_path):
    net = tutorial(5, (4, 1), 4)
    path = tmp_path / "net.pt"
    torch.jit.trace(net, torch.zeros(1, 5, 1, 1)).save(path)
    z = normal(2, 5, 1, 1).requires_grad_()
    images = load_generator(path, (5, 1, 1)).decode(Code(z))
    torch.testing.assert_close(images, net(z), rtol=0, atol=ROUNDING)
    (slope,) = torch.autograd.grad(images.square().sum(), z)
    assert slope.abs().max() > 1e-4
    with pytest.raises(PushforwardError, match="give latent_shape"):
        load_generator(path)


class Style(nn.Module):
    """What NVIDIA's generators look like from outside, inner noises included."""

    def __init__(self, classes: int = 0) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.z_dim, self.c_dim, self.img_resolution, self.img_channels = 6, classes, 4, 3
        self.mapping, self.synthesis = nn.Linear(6 + classes, 8), nn.Linear(8, 48)

    def forward(self, z: Tensor, c: Tensor, truncation_psi: float = 1.0, noise_mode: str = "random") -> Tensor:
        w = truncation_psi * self.mapping(torch.cat([z, c], 1))
        images = self.synthesis(w).view(-1, 3, 4, 4)
        return images + (noise_mode == "random") * torch.randn_like(images)


def test_stylegan_has_constant_noise_truncation_and_labels():
    net = Style()
    z = normal(2, 6)
    faces = stylegan(net, truncation=0.7)
    torch.testing.assert_close(faces.decode(Code(z)), net(z, z[:, :0], 0.7, "const"))
    assert faces.image_shape == (3, 4, 4)
    net = Style(classes=3)
    one_hot = torch.eye(3)[[2, 1]]
    told = stylegan(net)
    assert told.classes == ("0", "1", "2")
    torch.testing.assert_close(told.given(torch.tensor([2, 1])).decode(Code(z)), net(z, one_hot, 1.0, "const"))
    fixed = stylegan(net, label=1)
    torch.testing.assert_close(fixed.decode(Code(z)), net(z, one_hot[[1, 1]], 1.0, "const"))


# -- consistency models -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[None, 4], ids=["plain", "classes"])
def pipeline(request) -> Any:
    torch.manual_seed(1)
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4, num_class_embeds=request.param,
    )  # fmt: skip
    scheduler = diffusers.CMStochasticIterativeScheduler(num_train_timesteps=12, sigma_max=20.0, s_noise=1.01)
    return diffusers.ConsistencyModelPipeline(unet, scheduler)


@pytest.mark.parametrize("steps", [1, 3])
def test_consistency_folders_draw_what_their_pipeline_draws(pipeline, tmp_path, monkeypatch, steps):
    """The pipeline's own loop given our noises; its images are in [0, 1]. float32, in the same order: 1e-5."""
    pipeline.save_pretrained(tmp_path / "model")
    ours = load_generator(tmp_path / "model", steps=steps)
    code = ours.draw(3, seed=1)
    labels = torch.tensor([1, 3, 0]) if ours.classes else None
    noises = iter([] if code.noises is None else [*code.noises, torch.zeros_like(code.start)])
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_consistency_models.randn_tensor", lambda *args, **kwargs: next(noises)
    )
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(3, class_labels=labels, num_inference_steps=steps, latents=code.start, output_type="pt")
    images = ours.given(labels).decode(code)
    assert code.noises is None or len(code.noises) == steps - 1
    torch.testing.assert_close(images / 2 + 0.5, theirs.images, rtol=0, atol=ROUNDING)
    assert images.abs().min() < 0.9  # not all at the bounds


def test_multistep_consistency_of_gaussian_data_keeps_their_variance():
    """N(0, s^2): f(x, sigma) = x s / sqrt(s^2 + sigma^2) is exact, so every step's images have that variance.

    The first state has no data in it, and later ones a noise of sqrt(sigma^2 - sigma_min^2): a bias below 1e-4. 16000
    values: the variance has a relative standard error of 1.1%, here taken four times.
    """
    s = 0.5
    model = consistency(
        lambda x, sigma: x * s / (s**2 + sigma.view(-1, 1, 1, 1).square()).sqrt(), (1, 4, 4), sigmas=(80, 3, 0.5)
    )
    code = model.draw(1000)
    assert code.noises is not None
    assert code.noises.shape == (2, 1000, 1, 4, 4)
    images = model.decode(code)
    assert abs(images.var() / s**2 - 1) < 0.045
    torch.testing.assert_close(model.sample(4, first=3), images[3:7], rtol=0, atol=ROUNDING)
    torch.testing.assert_close(model.decode(code[[8, 2]]), images[[8, 2]], rtol=0, atol=ROUNDING)


# -- errors -----------------------------------------------------------------------------------------------------------


def test_faults_are_said_in_a_sentence(tmp_path):
    toy, told = gan(Toy(), 6, name="toy"), gan(Toy(2), 6, classes="ab", name="told")
    z = normal(2, 6)
    for said, action in {
        r"takes codes of shape \(6,\) an image; got \(7,\)": lambda: toy.decode(Code(normal(2, 7))),
        "noises of shape": lambda: toy.decode(Code(z, z[None])),
        "residual": lambda: toy.decode(Code(z, residual=z)),
        "has no classes": lambda: toy.given(torch.zeros(2, dtype=torch.long)).decode(Code(z)),
        "by class: give labels": lambda: told.decode(Code(z)),
        "from 0 to 1; got": lambda: told.given(torch.tensor([0, 2])).decode(Code(z)),
        "as many labels": lambda: told.given(torch.tensor([0, 1])).sample(3),
        "no class 'c'": lambda: told.given(["a", "c"]).decode(Code(z)),
        "at least 1": lambda: toy.sample(0),
        "Unknown prior 'cube'": lambda: gan(Toy(), 6, "cube"),
        "black, then white": lambda: gan(Toy(), 6, range=(1, 0)),
        r"fails on latents of shape \(2, 5\)": lambda: gan(Toy(), 5),
        r"make images .* it gave shape \(2, 6\)": lambda: gan(lambda z: z, 6),
        "of torch.int64": lambda: gan(lambda z: z.long().view(-1, 1, 2, 3), 6),
        "it gave a dict": lambda: gan(lambda z: {}, 6),
        "not finite": lambda: gan(lambda z: z.view(-1, 1, 2, 3) / 0, 6),
        "evaluation mode": lambda: gan(lambda z: torch.rand(len(z), 1, 2, 2), 6),
        "z_dim and c_dim": lambda: stylegan(Toy()),
        "takes no labels; got 1": lambda: stylegan(Style(), label=1),
        "0 to 2; got 3": lambda: stylegan(Style(3), label=3),
        "must decrease": lambda: consistency(lambda x, sigma: x, (1, 2, 2), sigmas=(1.0, 2.0)),
        "neither a file nor a folder": lambda: load_generator(tmp_path / "none.pth"),
    }.items():
        with pytest.raises(PushforwardError, match=said):
            action()


def test_a_method_of_a_network_is_put_into_evaluation_mode():
    """As `gan` does it, so that two calls agree."""

    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
            return nn.functional.dropout(self.layer(x), training=self.training)

    network = Mine()
    model = consistency(network.denoise, (1, 2, 4))
    assert not network.training
    assert torch.equal(model.sample(2), model.sample(2))


def test_files_that_are_no_generators_are_refused(tmp_path, pipeline):
    (tmp_path / "broken.pth").write_bytes(b"no network")
    np.savez(tmp_path / "data.npz", x=np.zeros(3))
    torch.save(Toy(), tmp_path / "module.pkl")
    torch.save([1], tmp_path / "list.pt")
    for name, said in {
        "broken.pth": "cannot be read",
        "data.npz": "cannot be read",
        "module.pkl": "with its own code",
        "list.pt": "holds a list",
    }.items():
        with pytest.raises(PushforwardError, match=said):
            load_generator(tmp_path / name)
    diffusers.DDPMPipeline(pipeline.unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "diffusion")
    with pytest.raises(PushforwardError, match=r"DDPMScheduler: open it with pushforward\.load"):
        load_generator(tmp_path / "diffusion")
    pipeline.save_pretrained(tmp_path / "model")
    with pytest.raises(PushforwardError, match="takes 1 to 12 steps; got 13"):
        load_generator(tmp_path / "model", steps=13)


# -- the example ------------------------------------------------------------------------------------------------------


def test_the_example_trains_thins_and_saves_what_can_be_loaded(tmp_path, monkeypatch):
    """Three steps; the images drawn are those of the generator that was trained, in evaluation mode."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    example = importlib.import_module("gan_fashion")
    labels = np.arange(200, dtype=np.uint8) % 2
    pixels = np.random.default_rng(0).integers(0, 256, (200, 28, 28, 1), dtype=np.uint8)
    np.savez("all.npz", x_train=pixels, y_train=labels, x_test=pixels[:4], y_test=labels[:4])
    trained: list[nn.Module] = []
    train = example.train
    monkeypatch.setattr(example, "train", lambda *args: trained.append(train(*args)) or trained[0])
    images = example.main("all.npz", 3, rare={1: 0.05}, data_out="rare.npz")
    rare = np.load("rare.npz")
    kept = (labels == 0) | (np.arange(200) < 10)  # all of one class, the first five of the other
    assert np.array_equal(rare["x_train"], pixels[kept])
    assert rare.files == ["x_train", "x_test"]  # without labels
    assert np.array_equal(rare["x_test"], pixels[:4])
    loaded = load_generator("gan.safetensors")
    assert loaded.image_shape == (1, 28, 28)
    expected = trained[0](loaded.draw(64).start[..., None, None])
    torch.testing.assert_close(images, expected.detach(), rtol=0, atol=ROUNDING)
    assert Path("gan.png").is_file()
