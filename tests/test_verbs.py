"""What a model can do: the functions of the front door, which are its methods."""

import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pushforward as pf
from pushforward import model as below
from pushforward.execute.anderson import Mixing
from pushforward.guidance import energies
from pushforward.guidance.decoding import Counted
from pushforward.guidance.dynamics import Dynamics
from pushforward.guidance.energies import near
from pushforward.guidance.optimisers import optimiser_of
from pushforward.guidance.particles import Lead, Particles
from pushforward.guidance.particles import guide as by_particles
from pushforward.guidance.posterior import target_of
from pushforward.linear import VP
from pushforward.maps.code import Code, derive_seed
from pushforward.maps.generator import gan
from pushforward.maps.spec import SamplerSpec
from pushforward.model.contents import model_digest
from pushforward.translation.edit import Search
from support.models import SIZE, reading, saved, tiny, tutorial
from support.training import TINY, some_data

METHODS = (
    "sample", "invert", "encode", "decode", "translate", "edit", "inpaint", "guide", "steer", "evaluate", "watermark",
    "read_watermark",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pf.Model:
    return pf.load(saved(VP(), tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
def images(model: pf.Model) -> torch.Tensor:
    return model.sample(3, steps=4, seed=5).clamp(-1, 1)


# -- the model ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_the_functions(name: str) -> None:
    assert vars(pf.Model)[name] is getattr(pf, name)
    assert inspect.getdoc(getattr(pf, name))


@pytest.mark.parametrize("name", [*METHODS, "train"])
def test_every_argument_is_described(name: str) -> None:
    function = getattr(pf, name)
    text = inspect.getdoc(function) or ""
    for argument in inspect.signature(function).parameters:
        assert f"\n    {argument}: " in text, argument


def test_the_shortest_program() -> None:
    model = pf.load("fashion-vp")
    images = model.sample(2, solver="gddim:order=2", steps=20, seed=0)
    codes = model.invert(images, solver="ddim", steps=20)
    assert images.shape == (2, 1, 28, 28)
    assert float((codes.decode() - images).abs().max()) < 1e-3


def test_what_is_made_of_a_model_has_the_verbs_too(model: pf.Model) -> None:
    for one in (model.given("a"), model.to("cpu"), model.given(["a", "b"]).some(slice(1)), replace(model, name="x")):
        assert type(one) is pf.Model
    assert isinstance(model, below.Model)
    lower = below.load(model.info.get("nothing", "fashion-vp"))
    assert type(lower) is below.Model
    assert pf.Model.of(model) is model
    assert model_digest(pf.Model.of(lower)) == model_digest(lower)
    made = pf.Model("mine", model.process, model.denoiser, model.shape, model.reference, model.classes)
    assert torch.equal(made.sample(2, steps=2), model.sample(2, steps=2))


def test_the_functions_take_models_without_methods() -> None:
    lower = tiny(VP())
    assert torch.equal(pf.sample(lower, 2, steps=3), pf.Model.of(lower).sample(2, steps=3))


# -- samplers and labels -----------------------------------------------------------------------------------------------


def test_seeds_are_whole_numbers_of_any_library() -> None:
    unchecked = inspect.unwrap(derive_seed)  # as users' seeds arrive, without the tests' check of annotations
    assert unchecked(np.int64(5), np.int32(2)) == derive_seed(5, 2)
    with pytest.raises(pf.PushforwardError, match=r"whole numbers; got 0\.5 and 0"):
        unchecked(0.5, 0)


def refusal(kind: Callable[..., Any], **settings: object) -> str:
    """The sentence with which settings are refused, without the tests' check of annotations."""
    if inspect.isclass(kind):
        settings["self"], kind = object.__new__(kind), vars(kind)["__init__"]
    with pytest.raises(pf.PushforwardError) as caught:
        inspect.unwrap(kind)(**settings)
    return str(caught.value)


@pytest.mark.parametrize("wrong", ["2", [1], object()], ids=["text", "list", "object"])
@pytest.mark.parametrize(
    "kind",
    [pf.Parallel, pf.Implicit, pf.Phantom, pf.Skeleton, pf.Steering, pf.Schedule, pf.Evaluation, pf.TrainConfig, pf.VP,
     pf.Cosine, pf.Discrete, pf.Blurring, Dynamics, Lead, Particles, SamplerSpec, Mixing, Search],
)  # fmt: skip
def test_settings_of_another_kind_are_refused(kind: type[Any], wrong: object) -> None:
    """Each setting, but for those that take text or a list."""
    taken = {"str": "2", "str | None": "2", "Sequence[float]": [1], "tuple[int, ...]": [1]}
    others: dict[Any, dict[str, Any]] = {
        pf.TrainConfig: {"steps": 1}, pf.Blurring: {"field": (8, 8)}, Dynamics: {"step": 1.0},
        Lead: {"dynamics": pf.mala(), "moves": 9, "at": 0.5},
    }  # fmt: skip
    for setting in fields(kind):
        if taken.get(setting.type) != wrong:
            assert refusal(kind, **others.get(kind, {}) | {setting.name: wrong})


def test_settings_of_another_kind_are_named() -> None:
    assert refusal(pf.Parallel, rounds="2") == "Parallel has a wrong 'rounds': it should be a valid integer; got '2'."
    assert "size as field=(height, width); got 2.5" in refusal(pf.Blurring, field=2.5)
    assert "a number or a tensor" in refusal(pf.Gaussian, mean="2")
    assert "as by mala()" in refusal(pf.guide, model=None, energy=near(torch.zeros(1, SIZE, SIZE)), dynamics="mala")
    assert "An energy is a function of images" in refusal(energies.of, function="dark")
    assert "positive learning rate; got 'adam', 9 and 'fast'" in refusal(
        optimiser_of, name="adam", steps=9, learning_rate="fast"
    )
    code = "import pushforward; pushforward.mala('2')"  # which the tests' check of annotations does not reach
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stderr
    assert "PushforwardError: The step size of Langevin dynamics must be a positive number; got '2'." in said


def test_settings_are_numbers_of_any_library() -> None:
    made = object.__new__(pf.Parallel)
    inspect.unwrap(pf.Parallel.__init__)(made, tolerance=torch.tensor(0.5), rounds=np.int64(3))
    assert (made, type(made.rounds)) == (pf.Parallel(tolerance=0.5, rounds=3), int)


def test_samples_are_those_of_the_map_beneath(model: pf.Model) -> None:
    plan = pf.solvers.gddim(model.process, pf.grid.power(model.process, 5), order=2)
    expected = pf.Diffusion(model, plan).given("b", 2.0).sample(3, seed=7)
    for solver, steps in (("gddim:order=2", 5), ("gddim:order=2:steps=5", None), (plan, None)):
        assert torch.equal(model.sample(3, solver=solver, steps=steps, labels="b", guidance=2.0, seed=7), expected)
        diffusion = model.diffusion(solver, steps, labels="b", guidance=2.0)
        assert torch.equal(diffusion.sample(3, seed=7), expected)
    assert model.plan("gddim:order=2", 5).nfe == plan.nfe


def test_images_that_miss_the_tolerance_are_told_with_what_to_do(model: pf.Model) -> None:
    """Two rounds of eight steps; the estimate is no less than the error."""
    way = pf.Parallel(max_rounds=2)
    with pytest.warns(
        UserWarning, match=r"on the safe side and often far, at .* Allow more rounds or a larger"
    ) as told:
        images = model.sample(2, steps=8, parallel=way)
    estimate = float(re.findall(r"at ([\d.e+-]+) of an image", str(told[0].message))[0])
    exact = model.sample(2, steps=8)
    assert estimate >= float(((images - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)).max())


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m: m.sample(2, solver="ddim:steps=4", steps=5), "give it once"),
        (lambda m: m.sample(2, solver=m.plan("ddim", 4), steps=5), "leave steps out"),
        (lambda m: m.sample(2, solver="dddim"), "Unknown solver 'dddim'"),
        (lambda m: m.sample(2, labels="c"), "no class 'c'"),
        (lambda m: m.sample(2, labels=torch.tensor([0.0, 1.0])), "whole numbers; got torch.float32 ones"),
        (lambda m: m.sample(2, labels=np.array([0.5, 1.0])), r"whole numbers; got array"),
        (lambda m: m.sample(2, labels=np.array([0, 2])), "no class 2"),
        (lambda m: m.sample(2, labels="a", guidance=1e300), r"finite number of 32 bits; got 1e\+300"),
        (lambda m: m.sample(2, labels="a", guidance=float("nan")), "finite number of 32 bits; got nan"),
        (lambda m: m.sample(2, parallel="fast"), "Unknown way 'fast'"),
        (lambda m: m.sample(2, solver="rk45", parallel=True), "never all at once|cannot be taken at once"),
        (lambda m: m.diffusion("rk45"), "chooses its steps as it goes"),
        (lambda m: m.invert(torch.zeros(1, 1, SIZE, SIZE), solver="auto"), "no way leads back"),
        (lambda m: m.decode(Code(torch.zeros(1, 1, SIZE, SIZE))), "Say by which solver"),
        (lambda m: m.translate(torch.zeros(1, 1, SIZE, SIZE), source="a", target="a"), "Both ends are the same"),
        (lambda m: m.steer(near(torch.zeros(1, SIZE, SIZE)), by="force"), "Unknown way 'force' to steer"),
        (lambda m: inspect.unwrap(pf.steer)(m, near(torch.zeros(1, SIZE, SIZE)), by=None), "Unknown way None to steer"),
        (lambda m: inspect.unwrap(Counted.of.__func__)(Counted, m, 2), "as model.diffusion.* gives it; got Model"),
        (lambda m: m.encode(torch.zeros(1, 1, SIZE, SIZE), batch=0), "a batch of at least 1; got 1 and 0"),
        (lambda m: pf.guide(m.diffusion("ddim", 2), near(torch.zeros(1, SIZE, SIZE)), steps=3), "bind it"),
        (
            lambda m: inspect.unwrap(target_of)(m.diffusion("ddim", 2), torch.sum, 1, 0, [4], None, 64),
            "got 1 and .4. and",
        ),
        (
            lambda m: inspect.unwrap(by_particles)(m.diffusion("ddpm", 2), torch.sum, pf.fk(), first=None),
            "and None and",
        ),
    ],
)
def test_what_does_not_fit_is_said(model: pf.Model, call, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call(model)


def test_images_have_numbers_of_their_own(model: pf.Model, images: torch.Tensor) -> None:
    """Any three of them are found as each is by its number alone; to the rounding of batches."""
    numbers, shown = [7, 2, 5], images[:3]
    verbs = (
        lambda x, first: model.invert(x, steps=3, first=first).code.end,
        lambda x, first: (
            model.invert(x, steps=3, method="optimised", solver="ddpm", first=first, batch=2, tolerance=1.0).code.start
        ),
        lambda x, first: model.log_likelihood(x, steps=2, first=first, batch=2).nats,
    )
    for verb in verbs:
        alone = torch.cat([verb(shown[k : k + 1], number) for k, number in enumerate(numbers)])
        torch.testing.assert_close(verb(shown, numbers), alone, rtol=1e-3, atol=1e-3)
    with pytest.raises(pf.PushforwardError, match="For 3 images give as many numbers; got 2"):
        model.invert(shown, first=[1, 2])


def test_labels_are_whole_numbers_of_any_library(model: pf.Model) -> None:
    for labels in (np.array([1, 0]), [np.int64(1), torch.tensor(0)], np.array(["b", "a"])):
        assert torch.equal(model.sample(2, steps=2, labels=labels), model.sample(2, steps=2, labels=["b", "a"]))
    for one in (np.int64(1), np.array(1), torch.tensor(1)):
        assert torch.equal(model.sample(2, steps=2, labels=one), model.sample(2, steps=2, labels="b"))
        assert torch.equal(model.given(one).sample(2, steps=2), model.sample(2, steps=2, labels="b"))


@pytest.mark.parametrize(
    "verb",
    [
        lambda m, x: m.invert(x, steps=2),
        lambda m, x: m.encode(x, steps=2),
        lambda m, x: m.edit(x, "a", "b", steps=2),
        lambda m, x: m.translate(x, source="a", target="b", steps=2),
        lambda m, x: m.inpaint(x, torch.ones(SIZE, SIZE, dtype=torch.bool), steps=2),
        lambda m, x: m.log_likelihood(x, steps=2),
        lambda m, x: m.read_watermark(x, key="key"),
    ],
)
def test_images_of_values_up_to_255_are_noticed(model: pf.Model, images: torch.Tensor, verb) -> None:
    """Warnings are errors here, and the first is of the images that are given."""
    with pytest.raises(pf.FarOutside, match=r"Images given to 'tiny' reach 2\.6e\+02.*127\.5"):
        verb(model, 127.5 * (images + 1))


def test_all_steps_at_once_are_the_same_images(model: pf.Model) -> None:
    plain = model.sample(2, solver="ddim", steps=6)
    for way in (True, "picard", pf.Parallel(tolerance=1e-5)):
        torch.testing.assert_close(model.sample(2, solver="ddim", steps=6, parallel=way), plain, atol=1e-3, rtol=1e-3)


def test_adaptive_steps_are_a_solver(model: pf.Model) -> None:
    assert model.sample(2, solver="rk45:tolerance=1e-2").shape == (2, 1, SIZE, SIZE)


def test_names_of_classes_are_labels_at_every_verb(model: pf.Model, images: torch.Tensor) -> None:
    mask = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    mask[:4] = True
    energy = near(torch.zeros(1, SIZE, SIZE))
    moves = pf.Schedule(2)
    code = model.diffusion("ddim", 3).draw(3)
    for names, numbers in ((["a", "b", "b"], torch.tensor([0, 1, 1])), ("b", 1)):
        for verb in (
            lambda labels: model.sample(3, steps=3, labels=labels),
            lambda labels: model.invert(images, steps=4, labels=labels).code.start,
            lambda labels: model.encode(images, steps=4, labels=labels).code.start,
            lambda labels: model.decode(code, solver="ddim", steps=3, labels=labels),
            lambda labels: model.inpaint(images, mask, steps=2, labels=labels),
            lambda labels: model.translate(images, source="a", target=labels, steps=4).images,
            lambda labels: model.edit(images, source=labels, target="a", steps=4).images,
            lambda labels: model.guide(energy, schedule=moves, chains=3, steps=2, labels=labels).images,
        ):
            assert torch.equal(verb(names), verb(numbers))


def test_prompts_are_labels_of_a_model_that_reads() -> None:
    model = pf.Model.of(reading())
    red = model.sample(2, steps=2, labels="red")
    assert torch.equal(red, model.sample(2, steps=2, labels=["red", "red"]))
    assert model.edit(red[0], "red", "blue", steps=4).images.shape == (1, 3, SIZE, SIZE)


# -- codes -------------------------------------------------------------------------------------------------------------


def test_codes_decode_again(model: pf.Model, images: torch.Tensor) -> None:
    inverted = model.invert(images, steps=8, labels="b")
    encoded = model.encode(images, steps=8, labels="b")
    for found in (inverted, encoded):
        assert float((found.decode() - images).abs().max()) < 1e-3
        assert torch.equal(model.decode(found), found.decode())
        torch.testing.assert_close(model.decode(found, batch=2), found.decode(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model.decode(found, parallel=True), found.decode(), atol=1e-2, rtol=1e-2)
        assert not torch.equal(model.decode(found, labels="a"), found.decode())
    with pytest.raises(pf.PushforwardError, match="another model's"):
        replace(model, name="other").decode(inverted)
    with pytest.raises(pf.PushforwardError, match="know their own steps; leave steps out"):
        model.decode(inverted, steps=8)
    solver = f"ddim:end={model.process.t_min}"
    assert torch.equal(model.decode(inverted.code, solver=solver, steps=8, labels="b"), inverted.decode())


def test_what_verbs_make_of_a_network_in_training_holds_no_graph(images: torch.Tensor, tmp_path: Path) -> None:
    """Weights that take gradients, as a user's own do, would keep the graph of all steps, and numpy would refuse."""
    model = pf.load(saved(VP(), tmp_path / "tiny"))
    assert model.module is not None
    model.module.requires_grad_(True)
    found = [model.invert(images, steps=8), model.encode(images, steps=8, solver="ddim:eta=0.5")]
    mask, bright = images[0, 0] > 0, images.mean((1, 2, 3))
    made = [
        *(one.decode() for one in found), *(one.code.start for one in found), *(model.decode(one) for one in found),
        model.sample(2, steps=4), model.sample(2, steps=4, parallel=True), model.sample(2, solver="rk45:tolerance=0.1"),
        model.edit(images, "a", "b", steps=4).images, model.edit(images, "a", "b", steps=4, method="flowedit").images,
        model.inpaint(images, mask, steps=2), model.log_likelihood(images, steps=2).nats,
        model.guide(lambda x: (x.mean((1, 2, 3)) - bright.mean()).square(), steps=2, chains=2,
                    schedule=pf.Schedule(2)).images,
    ]  # fmt: skip
    assert not any(one.requires_grad for one in made)
    with torch.enable_grad():
        assert found[0].pushforward.decode(found[0].code).requires_grad


def test_codes_are_decoded_by_the_model_that_is_asked(model: pf.Model, images: torch.Tensor, tmp_path: Path) -> None:
    """Of models of one name, a reading from the same folder is the same; other weights or a steering are not."""
    found = model.given("b").invert(images, steps=8)
    folder = saved(VP(), tmp_path / model.name)
    assert torch.equal(pf.load(folder).decode(found), found.decode())
    assert torch.equal(model.given("a").decode(found), found.decode())
    other = pf.load(folder)
    with torch.no_grad():
        next(other.module.parameters()).add_(0.1)
    for another in (other, model.steer(lambda images: images.square().sum((1, 2, 3)))):
        with pytest.raises(pf.PushforwardError, match="another model's"):
            another.decode(found)


HOSTS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "inference mode": torch.inference_mode,
    "another device": lambda: setting(torch.set_default_device, "meta", None),
    "float64": lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
    "float16": lambda: setting(torch.set_default_dtype, torch.float16, torch.float32),
}


@contextmanager
def setting(change: Callable[[Any], None], value: Any, back: Any) -> Iterator[None]:
    change(value)
    try:
        yield
    finally:
        change(back)


def test_what_the_program_around_has_set_changes_nothing(model: pf.Model, images: torch.Tensor, tmp_path: Path) -> None:
    folder, half = saved(VP(), tmp_path / "tiny"), torch.arange(SIZE * SIZE).view(SIZE, SIZE) % 2 == 0
    energy, moves = near(torch.zeros(1, SIZE, SIZE)), pf.Schedule(steps=2)
    there, noisy = model.diffusion("ddim", 2), model.diffusion("ddpm", 2)
    steered, code = model.steer(energy).diffusion("ddim", 2), there.draw(2)
    torch.save(tutorial(5, (4, 1), 4).state_dict(), tmp_path / "dcgan.pth")

    def classified(images: torch.Tensor) -> torch.Tensor:
        return pf.energies.load_classifier("fashion").logits(torch.nn.functional.interpolate(images, (28, 28)))

    calls = {
        "sample": lambda: model.sample(2, steps=4),
        "load": lambda: pf.load(folder).sample(2, steps=4),
        "at once": lambda: model.sample(2, solver="ddim:steps=6", parallel=True),
        "invert": lambda: model.invert(images, steps=4, method="optimised", tolerance=0.5).code.start,
        "encode": lambda: model.encode(images, steps=4).code.start,
        "translate": lambda: model.translate(images, source="a", target="b", steps=4).images,
        "inpaint": lambda: model.inpaint(images, half, steps=2, repeats=1),
        "likelihood": lambda: model.log_likelihood(images, steps=2, draws=1).nats,
        "guide": lambda: model.guide(energy, pf.mala(), moves, solver="ddim", steps=2, chains=2).images,
        "best": lambda: pf.best(there, energy, steps=2).images,
        "particles": lambda: pf.guide(noisy, energy, pf.psi(moves=2), chains=2).images,
        "chains": lambda: pf.guidance.posterior.guide(there, energy, pf.mala(), moves, chains=2).images,
        "white": lambda: pf.best(there, energy, optimiser="white", steps=3).images,
        "steered": lambda: steered.sample(2),
        "adaptive": lambda: pf.AdaptiveDiffusion(model, 1e-2).sample(2),
        "processes": lambda: pf.Diffusion(model, pf.solvers.gddim(pf.VP(), pf.grid.karras(pf.VP(), 3))).decode(code),
        "gan": lambda: pf.load_generator(tmp_path / "dcgan.pth").sample(2),
        "classifier": lambda: classified(images),
        "steer": lambda: model.steer(energy, by="lgd").sample(2, solver="ddim", steps=3),
        "mark": lambda: model.watermark(1, key="k", message=b"a", steps=2).images,
        "read": lambda: model.read_watermark(images, key="k", steps=2).p_value,
    }
    for name, call in calls.items():
        plain = call()
        for host, enter in HOSTS.items():
            with enter():
                found = call()
            # nothing but rounding may differ: the coefficients are float64, in whatever mode
            torch.testing.assert_close(found, plain, atol=1e-4, rtol=1e-4, msg=f"{name} in {host}")


def test_images_of_inference_mode_are_images(model: pf.Model, images: torch.Tensor) -> None:
    with torch.inference_mode():
        made = images + 0
    found = model.log_likelihood(made, steps=2, draws=1)
    torch.testing.assert_close(found.nats, model.log_likelihood(images, steps=2, draws=1).nats)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda x: ((x + 1) * 127.5).byte(), "got torch.uint8: divide bytes by 127.5, less 1"),
        (lambda x: x.log(), "must be of finite numbers; 3 of 3 are not"),
        (lambda x: x[:, :, 1:], "has images of shape (1, 8, 8); got (1, 7, 8)"),
        (lambda x: x[:0], "There is no image here"),
        (lambda x: x.numpy(), "Images are a tensor in [-1, 1], (count, channels, height, width); got ndarray"),
    ],
)
@pytest.mark.parametrize("verb", ["invert", "encode", "translate", "inpaint", "log_likelihood", "read_watermark"])
def test_images_that_are_none_are_refused_by_every_verb(
    model: pf.Model, images: torch.Tensor, verb: str, spoil: Callable[[torch.Tensor], Any], said: str
) -> None:
    more = {
        "translate": {"source": "a", "target": "b"},
        "inpaint": {"mask": torch.ones(SIZE, SIZE, dtype=torch.bool)},
        "read_watermark": {"key": "k"},
    }
    unchecked = inspect.unwrap(getattr(pf, verb))  # as users call it, without the tests' check of annotations
    with pytest.raises(pf.PushforwardError, match=re.escape(said)):
        unchecked(model, spoil(images), **more.get(verb, {}))


def test_no_images_have_no_codes(model: pf.Model, images: torch.Tensor) -> None:
    for find in (model.invert, model.encode):
        with pytest.raises(pf.PushforwardError, match=r"an image|no image"):
            find(images[:0], steps=4)


def test_batches_make_no_difference(model: pf.Model, images: torch.Tensor) -> None:
    whole, parts = (model.invert(images, steps=6, labels=["a", "b", "a"], batch=n) for n in (64, 2))
    torch.testing.assert_close(whole.code.start, parts.code.start, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(whole.residual.cpu(), parts.residual, atol=1e-4, rtol=1e-4)
    assert torch.equal(parts.code.end, whole.code.end.cpu())
    assert float((parts.decode() - images).abs().max()) < 1e-3


@pytest.mark.parametrize("method", ["naive", "optimised"])
def test_other_inversions_are_methods(model: pf.Model, images: torch.Tensor, method: str) -> None:
    found = model.invert(images[0], solver="ddim:end=0.01" if method == "naive" else "ddpm", steps=6, method=method)
    error = (found.decode() - images[:1]).flatten(1)
    expected = error.abs().amax(1) if method == "naive" else error.norm(dim=1)
    assert float(found.residual) == pytest.approx(float(expected), rel=1e-3, abs=1e-5)


# -- changes -----------------------------------------------------------------------------------------------------------


def test_images_are_translated_between_models(model: pf.Model, images: torch.Tensor) -> None:
    other = pf.Model.of(tiny(VP()))
    found = model.translate(images, other, start=0.5, steps=6)
    assert found.images.shape == images.shape
    assert not torch.equal(found.images, model.translate(images, other, start=1, steps=6).images)
    same = model.translate(images, source="a", target="b", method="deterministic", solver="ddim:steps=6:start=0.5")
    assert same.residual is not None


def test_what_a_mask_leaves_is_kept(model: pf.Model, images: torch.Tensor) -> None:
    mask = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    mask[:4] = True
    painted = model.inpaint(images, mask, steps=3, repeats=2)
    assert torch.equal(painted[:, :, 4:], images[:, :, 4:])
    assert not torch.equal(painted, images)


# -- wishes ------------------------------------------------------------------------------------------------------------


def test_models_and_other_maps_are_guided(model: pf.Model) -> None:
    energy, moves = near(torch.zeros(1, SIZE, SIZE)), pf.Schedule(2)
    found = model.guide(energy, pf.mala(), moves, chains=2, solver="ddim", steps=2)
    same = pf.guide(model.diffusion("ddim", 2), energy, pf.mala(), moves, chains=2)
    assert torch.equal(found.images, same.images)
    drawn = gan(lambda z: z[..., None, None].expand(-1, 1, SIZE, SIZE), 1, name="flat")
    assert pf.guide(drawn, energy, schedule=moves, chains=2).images.shape == found.images.shape


def test_a_steered_model_is_a_model(model: pf.Model) -> None:
    target = torch.ones(1, SIZE, SIZE)
    steered = model.steer(near(target), by="mpgd")
    assert type(steered) is pf.Model
    plain, pulled = (one.sample(2, solver="ddim", steps=4) for one in (model, steered))
    assert float((pulled - target).square().mean()) < float((plain - target).square().mean())
    assert torch.equal(model.steer(near(target), by=pf.Steering(direct=1.0)).sample(2, solver="ddim", steps=4), pulled)


# -- training and evaluation -------------------------------------------------------------------------------------------


class Halves(torch.nn.Module):
    """Features: the mean of each half of an image."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().flatten(1).unflatten(1, (2, -1)).mean(2)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_trained_model_is_evaluated(tmp_path: Path) -> None:
    data, config = some_data(100), pf.TrainConfig(steps=2, **TINY)
    model = pf.train(data, tmp_path / "model", config)
    assert type(model) is pf.Model
    assert model.classes == data.classes
    torch.jit.trace(Halves(), data.images[:1]).save(tmp_path / "halves.pt")
    rows = model.evaluate(
        data, ["ddim:steps=2"], features=str(tmp_path / "halves.pt"), out=tmp_path / "runs",
        settings=pf.Evaluation(count=100, converged=4, resamples=2, batch=50),
    )  # fmt: skip
    assert [row.sampler for row in rows] == ["converged", "ddim"]
