"""What tells a model, a network or a function from others, and what does not."""

import dataclasses
import functools
import importlib
import sys

import pytest
import torch
from torch import nn

import pushforward as pf
from pushforward.data.files import digest
from pushforward.denoiser import Function
from pushforward.linear import VP, Gaussian
from pushforward.model import Model, Network, save_model
from pushforward.model.contents import contents, model_digest
from pushforward.vision.classifiers import load_classifier
from pushforward.vision.clip import Clip
from pushforward.vision.faces import FaceNet
from pushforward.vision.features import FashionNet
from support.helpers import normal
from support.models import reading


class Layer(nn.Module):
    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain, self.inner = gain, nn.Conv2d(1, 1, 1)
        self.register_buffer("shift", torch.zeros(1), persistent=False)
        with torch.no_grad():
            self.inner.weight.fill_(0.5), self.inner.bias.fill_(0)

    def forward(self, u, t, condition=None):
        return self.gain * self.inner(u) + self.shift


def model(layer=None, **changes):
    own = {key: changes.pop(key) for key in ("name", "process", "shape", "classes", "statistics") if key in changes}
    network = Network(layer or Layer(), **changes)
    return Model(**{"name": "mine", "process": VP(), "shape": (1, 4, 4), **own, "denoiser": network})


def spoiled(change):
    layer = Layer()
    with torch.no_grad():
        change(layer)
    return layer


OTHERS = {
    "a weight": model(spoiled(lambda layer: layer.inner.weight.add_(1e-6))),
    "a bias": model(spoiled(lambda layer: layer.inner.bias.add_(1e-6))),
    "a buffer that is not saved": model(spoiled(lambda layer: layer.shift.add_(1e-6))),
    "a number of the module": model(Layer(1.5)),
    "precision": model(Layer().half()),
    "prediction": model(prediction="v"),
    "time": model(time_scale=1000.0),
    "clock": model(clock=lambda t: 2 * t),
    "another clock": model(clock=lambda t: 3 * t),
    "bound": model(clip=1.0),
    "input": model(input_reference=Gaussian(0.25)),
    "process": model(process=VP(beta_max=19.0)),
    "shape": model(shape=(1, 4, 5)),
    "classes": model(classes=("a", "b")),
    "statistics": model(statistics=Gaussian(0.2)),
    "decoder": dataclasses.replace(model(), decoder=nn.Tanh()),
    "function": dataclasses.replace(model(), denoiser=Function(lambda u, t: 0.5 * u)),
    "another function": dataclasses.replace(model(), denoiser=Function(lambda u, t: 0.4 * u)),
}


def test_models_are_told_apart_by_all_that_counts():
    found = {name: model_digest(each) for name, each in {**OTHERS, "itself": model()}.items()}
    assert len(set(found.values())) == len(found)


def test_neither_name_nor_place_nor_use_counts(tmp_path):
    assert model_digest(model()) == model_digest(model(name="other"))
    save_model(reading(side=8), tmp_path / "one")
    save_model(reading(side=8), tmp_path / "two")
    one, two = pf.load(tmp_path / "one"), pf.load(tmp_path / "two")
    before = model_digest(one)
    pf.Diffusion(one, pf.SOLVERS["ddim"](one.process, pf.grid.uniform(one.process, 2))).given(["a cat"]).sample(1)
    assert model_digest(one) == before == model_digest(two)
    assert model_digest(pf.load(tmp_path / "two", dtype=torch.bfloat16)) != before


def test_compiled_networks_are_told_apart(tmp_path):
    """By their attributes and operations, too, and each file is like itself."""

    class Scaled(nn.Module):
        def __init__(self, gain: float) -> None:
            super().__init__()
            self.gain = gain

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.gain * x

    found = []
    for gain in (1.0, 2.0):
        for name, module in {
            "s": torch.jit.script(Scaled(gain)),
            "t": torch.jit.trace(Scaled(gain), normal(1)),
        }.items():
            module.save(tmp_path / f"{name}{gain}.pt")
            again = [digest(contents(torch.jit.load(tmp_path / f"{name}{gain}.pt"))) for _ in range(2)]
            assert again[0] == again[1]
            found.append(again[0])
    assert len(set(found)) == 4


def test_networks_that_look_at_images_are_known_by_the_names_of_version_0_1():
    """So that what was guided or chosen by them goes on; the rest of their digests depends on PyTorch's settings."""
    found = contents(load_classifier("fashion"))
    assert found[0] == "pushforward.tasks.energies.networks.Classifier"
    assert found[1]["logits"][0] == "pushforward.tasks.energies.networks.load_classifier.<locals>.<lambda>"
    assert contents([Clip, FaceNet, FashionNet]) == [
        "pushforward.tasks.clip.Clip", "pushforward.tasks.energies.faces.FaceNet",
        "pushforward.tasks.features.FashionNet",
    ]  # fmt: skip


@pytest.fixture
def written(tmp_path, monkeypatch):
    """The digest of the function `energy` in a new file of the user's, which may import `helper.py` beside it."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def run(text: str, helper: str = "") -> str:
        for name, body in {"user_energies": text, "user_helper": helper}.items():
            (tmp_path / f"{name}.py").write_text(body)
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
        try:
            return digest(contents(importlib.import_module("user_energies").energy))
        finally:
            sys.dont_write_bytecode = before

    return run


def test_a_users_function_is_its_code_and_all_that_this_names(written, tmp_path):
    torch.save(torch.zeros(3), tmp_path / "zeros.pt")
    torch.save(torch.ones(3), tmp_path / "ones.pt")
    head = "import torch\nfrom pathlib import Path\n"
    load = (
        head + "WEIGHTS = torch.load(Path(__file__).parent / '{}.pt')\ndef energy(x, code): return (x * WEIGHTS).sum()"
    )
    use = "import user_helper\ndef energy(x, code): return user_helper.scaled(x)"
    late = "def energy(x, code):\n    from user_helper import scaled\n    return scaled(x)"
    call = "class Call:\n    def __call__(self, x, code): return {} * x\nenergy = Call()"
    texts = [
        ("def energy(x, code): return x.mean()", ""), ("def energy(x, code): return x.sum()", ""),
        ("def energy(x, code, a=1): return a * x", ""), ("def energy(x, code, a=2): return a * x", ""),
        ("A = 1\ndef energy(x, code): return A * x", ""), ("A = 2\ndef energy(x, code): return A * x", ""),
        ("def f(x): return x\ndef energy(x, code): return f(x)", ""),
        ("def f(x): return 2 * x\ndef energy(x, code): return f(x)", ""),
        (load.format("zeros"), ""), (load.format("ones"), ""), (call.format(1), ""), (call.format(2), ""),
        (use, "def scaled(x): return x"), (use, "def scaled(x): return 2 * x"),
        (use, "A = 3\ndef scaled(x): return A * x"), (late, "def scaled(x): return x"),
        (late, "def scaled(x): return 2 * x"),
    ]  # fmt: skip
    found = [written(*each) for each in texts]
    assert len(set(found)) == len(found)
    assert found == [written(*each) for each in texts]
    assert written("# said\n" + texts[0][0]) == found[0]  # a remark changes nothing


def test_what_meets_itself_ends():
    def energy(x):
        return energy(x)

    loop = [energy, functools.partial(energy, 1)]
    loop.append(loop)
    assert digest(contents(loop)) == digest(contents(loop))
