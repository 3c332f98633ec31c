"""The embedded models on a GPU: the images, codes and gradients of the CPU, and every command. Skipped without a GPU.

Networks run in float32 on both devices, without TF32. Convolutions add up in another order there: relative errors stay
below 1e-5 a call, and below 1e-3 after the 8 to 50 calls of these tests.
"""

import json

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import pushforward as pf
from pushforward.cli import app
from pushforward.data.pictures import save_image, sheet
from pushforward.guidance import energies
from pushforward.guidance.inpaint import inpaint
from pushforward.guidance.steering import STEERINGS
from pushforward.maps.spec import SamplerSpec, parse
from support.models import tutorial

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

MODELS = ["fashion-vp", "fashion-blurring", "fashion-langevin"]
runner = CliRunner()


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def diffusion(name, device, sampler="dpm++", steps=8, **options):
    model = pf.load(name, device=device)
    return pf.Diffusion(model, SamplerSpec(sampler, steps, options).plan(model))


def gap(x: Tensor, y: Tensor) -> float:
    """Relative, on the CPU."""
    x, y = x.detach().cpu().double(), y.detach().cpu().double()
    return float((x - y).norm() / y.norm())


@pytest.mark.parametrize("sampler", ["dpm++", "gddim", "ddpm", "heun"])
@pytest.mark.parametrize("name", [*MODELS, "emoji"])
def test_the_same_seed_gives_the_same_images_as_on_the_cpu(name, sampler):
    labels = ["noto", "apple, twemoji"] if name == "emoji" else torch.tensor([3, 7])
    here, there = (diffusion(name, device, sampler).given(labels).sample(2, seed=4) for device in ("cpu", "cuda"))
    assert gap(there, here) < 1e-3


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_all_steps_at_once_give_what_one_after_another_gives(name, eta):
    sampler = diffusion(name, "cuda", "ddim", 20, eta=eta)
    method = parse("ddim:parallel=preconditioned").method(sampler.plan)
    together = sampler.run_by(parallel=method)
    assert gap(together.sample(2), sampler.sample(2)) < 1e-2  # the rounds' tolerance, with a margin


@pytest.mark.parametrize("name", MODELS)
def test_codes_of_images_give_the_images_back(name):
    model = pf.load(name, device="cuda")
    plan = pf.SOLVERS["ddim"](model.process, pf.grid.power(model.process, 50, end=model.process.t_min))
    sampler = pf.Diffusion(model, plan)
    images = diffusion(name, "cuda").sample(2).clamp(-1, 1)
    assert gap(sampler.decode(sampler.invert(images).code), images) < 1e-3
    noisy = diffusion(name, "cuda", "ddpm", 20)
    assert gap(noisy.decode(noisy.encode(images).code), images) < 1e-3


@pytest.mark.parametrize("way", [pf.Exact(), pf.Implicit(tolerance=1e-4), pf.Phantom(), pf.Skeleton()], ids=repr)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_cpu(name, way):
    def slope(device):
        sampler = diffusion(name, device, "ddim", 8)
        code = sampler.draw(2, seed=1)
        start = code.start.clone().requires_grad_()
        made = sampler.run_by(gradient=way).decode(pf.Code(start, code.noises, code.end))
        return torch.autograd.grad(made.square().sum(), start)[0]

    assert gap(slope("cuda"), slope("cpu")) < 5e-3  # the implicit one's tolerance, with a margin


@pytest.mark.parametrize("dynamics", [pf.langevin(), pf.mala(), pf.hmc(leaps=2)], ids=["langevin", "mala", "hmc"])
def test_chains_run_and_go_on(dynamics):
    sampler = diffusion("fashion-vp", "cuda", steps=3)
    energy = energies.classifier(energies.load_classifier("fashion", device="cuda"), "sneaker")
    states = []
    whole = pf.guide(sampler, energy, dynamics, pf.Schedule(6), chains=3, callback=states.append)
    again = pf.guide(sampler, energy, dynamics, pf.Schedule(6), chains=3, resume=states[3])
    assert gap(sampler.decode(whole.code), whole.images) < 1e-4
    assert gap(again.images, whole.images) < 1e-2  # sums of a GPU come in any order, and moves accept or not by them


@pytest.mark.parametrize("optimiser", ["adam", "l-bfgs", "white"])
def test_descents_run(optimiser):
    sampler = diffusion("fashion-vp", "cuda", steps=3)
    energy = energies.classifier(energies.load_classifier("fashion", device="cuda"), "sneaker")
    found = pf.best(sampler, 5 * energy, steps=6, count=3, optimiser=optimiser)
    assert found.energy.isfinite().all()


@pytest.mark.parametrize("method", STEERINGS)
@pytest.mark.parametrize("name", MODELS)
def test_steered_images_are_those_of_the_cpu(name, method):
    def made(device):
        model = pf.load(name, device=device)
        energy = energies.classifier(energies.load_classifier("fashion", device=device), "sneaker")
        other = pf.steered(model, energy, STEERINGS[method])
        return pf.Diffusion(other, SamplerSpec("ddim", 6, {"eta": 1.0}).plan(other)).sample(2, seed=1)

    assert gap(made("cuda"), made("cpu")) < 0.1  # a classifier's gradients jump where it does: .02 has been seen


def test_inpainting_keeps_what_is_known():
    model = pf.load("fashion-langevin", device="cuda")
    sampler = pf.Diffusion(model, SamplerSpec("ddpm", 10).plan(model))
    images = diffusion("fashion-langevin", "cuda").sample(2).clamp(-1, 1)
    known = torch.arange(28) < 14
    painted = inpaint(sampler, images, known.expand(1, 28, 28), draws=2)
    assert torch.equal(painted[..., :14], images.cpu()[:, None, ..., :14].expand(-1, 2, -1, -1, -1))
    assert gap(painted[:, 0, ..., 14:], images[..., 14:]) > 0.01


def test_generators_are_guided_on_the_gpu(tmp_path):
    torch.save(tutorial(5, (8, 1), 7).state_dict(), tmp_path / "gan.pth")
    gan = pf.load_generator(tmp_path / "gan.pth", device="cuda")
    found = pf.guide(gan, lambda images, _: images.square().flatten(1).mean(1), pf.mala(), pf.Schedule(4), chains=2)
    assert gap(gan.decode(found.code), found.images) < 1e-4


# -- commands, which take the GPU by themselves -----------------------------------------------------------------------


def run(*words):
    """As a user runs it: with TF32."""
    torch.backends.cudnn.allow_tf32 = True
    result = runner.invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result


@pytest.fixture(scope="module")
def shoes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shoes")
    for i, image in enumerate(diffusion("fashion-vp", "cpu").given(torch.tensor([7, 7, 9])).sample(3)):
        save_image(sheet(image[None], smallest=1), folder / f"{i}.png")
    return folder


def test_sample(tmp_path):
    run("sample", "fashion-vp", "--count", 4, "--out", tmp_path / "x.png", "--json", tmp_path / "x.json")
    run("sample", "fashion-vp", "--solver", "ddim", "--steps", 20, "--count", 2, "--parallel", "auto",
        "--out", tmp_path / "y.png")  # fmt: skip
    run("sample", "emoji", "--prompt", "red apple, noto", "--guidance", 2, "--count", 2, "--dtype", "bfloat16",
        "--out", tmp_path / "z.png")  # fmt: skip
    assert json.loads((tmp_path / "x.json").read_text())


def test_codes(tmp_path, shoes):
    run("invert", "fashion-vp", shoes / "0.png", "--solver", "ddim", "--steps", 20, "--out", tmp_path / "c.safetensors")
    run("decode", tmp_path / "c.safetensors", "--out", tmp_path / "again.png")
    run("encode", "fashion-langevin", shoes / "0.png", shoes / "1.png", "--out", tmp_path / "d.safetensors")
    run("interpolate", tmp_path / "d.safetensors", "--frames", 3, "--out", tmp_path / "between.png")


def test_translate_edit_and_inpaint(tmp_path, shoes):
    run("translate", shoes, "--source", "fashion-vp", "--target", "fashion-blurring", "--steps", 10,
        "--out", tmp_path / "t")  # fmt: skip
    run("sample", "emoji", "--prompt", "apple, noto", "--count", 1, "--out", tmp_path / "apple.png")
    run("edit", tmp_path / "apple.png", "--model", "emoji", "--source", "apple, noto", "--target", "apple, twemoji",
        "--steps", 10, "--trials", 2, "--out", tmp_path / "e")  # fmt: skip
    mask = torch.full((1, 28, 28), -1.0)
    mask[..., 14:] = 1
    save_image(sheet(mask[None]), tmp_path / "mask.png")
    run(
        "inpaint",
        "fashion-vp",
        shoes / "0.png",
        "--mask",
        tmp_path / "mask.png",
        "--steps",
        10,
        "--out",
        tmp_path / "i",
    )


@pytest.mark.parametrize("sampler", ["langevin", "hmc", "adam", "ugd"])
def test_guide(tmp_path, sampler):
    plan = "ddpm:steps=6" if sampler == "ugd" else "dpm++:steps=3"
    steps = [] if sampler == "ugd" else ["--steps", 4]
    run("guide", "fashion-blurring", "--energy", "classifier:fashion:label=sneaker:weight=5", "--sampler", sampler,
        "--plan", plan, *steps, "--chains", 3, "--out", tmp_path / "g", "--json")  # fmt: skip


def test_train_and_evaluate(tmp_path, shoes):
    run("train", tmp_path / "m", "--data", shoes, "--network", "tiny", "--steps", 25, "--batch", 2, "--sample-every", 0)
    assert "NaN" not in (tmp_path / "m" / "training" / "log.jsonl").read_text()
    run("train", tmp_path / "m", "--data", shoes, "--network", "tiny", "--steps", 45, "--batch", 2, "--sample-every", 0)
    np.savez(tmp_path / "data.npz", x_test=np.random.default_rng(0).integers(0, 256, (100, 28, 28), dtype=np.uint8))
    run("evaluate", "fashion-vp", "--data", tmp_path / "data.npz", "--split", "test", "--features", "fashion",
        "--count", 100, "--converged", 10, "--solvers", "ddim,ddpm", "--nfe", 5, "--out", tmp_path / "v")  # fmt: skip
