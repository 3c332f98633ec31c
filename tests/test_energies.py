"""Energies: gradients, one image at a time, and values that are known."""

import json
import math
import os
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import avg_pool2d, binary_cross_entropy_with_logits, cross_entropy, max_pool2d, pad

from pushforward.data.inputs import read_like
from pushforward.errors import PushforwardError
from pushforward.guidance.energies import (
    Classifier,
    FaceNet,
    attribute,
    chi,
    classifier,
    clip_image,
    clip_text,
    colour,
    concentration,
    gaussian,
    identity,
    load_classifier,
    load_faces,
    low_pass,
    masked,
    near,
    perceptual,
    prepared,
    score,
    views,
)
from pushforward.guidance.energies.energy import of
from pushforward.guidance.energies.parse import ENERGIES, Setting
from pushforward.guidance.energies.parse import energy as of_words
from pushforward.maps.code import Code
from pushforward.vision.clip import load_clip
from support.helpers import normal
from support.packages import without

SIDE = 8
COUNT = 3


def picture(seed=10, channels=3, side=SIDE):
    return normal(channels, side, side, seed=seed).clamp(-1, 1)


def batch(count=COUNT, channels=3, side=SIDE, seed=0):
    return normal(count, channels, side, side, seed=seed) / 2


def a_code(count=COUNT, scale=1.5):
    """Off Gaussian, so that no penalty is flat there."""
    return Code(scale * normal(count, 1, 4, 4, seed=1) + 0.4, scale * normal(2, count, 1, 4, 4, seed=2))


def half():
    mask = torch.zeros(SIDE, SIDE)
    mask[:, : SIDE // 2] = 1
    return mask


def smooth(outputs=4, seed=3):
    """A small network with a gradient everywhere."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, outputs))
    return net.double().requires_grad_(False)


@pytest.fixture(scope="module")
def clip(clip_folder):
    found = load_clip(clip_folder)
    return replace(found, model=found.model.double())


CASES = {
    "near": lambda _: near(picture(), deviation=0.3),
    "low_pass": lambda _: low_pass(picture(), (2, 3), deviation=0.1),
    "masked": lambda _: masked(picture(), half(), deviation=0.5),
    "colour": lambda _: colour((0.5, -0.5, 1.0), deviation=0.1),
    "colour of a part": lambda _: colour(0.3, half(), deviation=0.1),
    "clip_text": lambda clip: clip_text(clip, "a red cat", views=views(3)),
    "clip_image": lambda clip: clip_image(clip, picture(side=20)),
    "classifier": lambda _: classifier(prepared(smooth(), size=9, mean=(0.4, 0.5, 0.6), deviation=0.2), 2),
    "attribute": lambda _: attribute(smooth(), 1, wanted=False),
    "score": lambda _: score(smooth(1), views=views(4, seed=1)),
    "identity": lambda _: identity(smooth(), picture()),
    "euclidean identity": lambda _: identity(smooth(), picture(), metric="euclidean"),
    "gaussian": lambda _: gaussian(),
    "chi": lambda _: chi(),
    "concentration": lambda _: concentration(shuffles=3),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_finite_differences_and_a_batch_is_its_images(name, clip):
    """Central differences in float64: of 1e-5, so an error of 1e-10, and rounding of 1e-16 / 1e-5; 1e-6 in all."""
    energy = CASES[name](clip)
    images, code = batch(), a_code()
    variables = [images.requires_grad_(), code.variables().requires_grad_()]
    value = energy(images, code.with_variables(variables[1]))
    gradients = torch.autograd.grad(value.sum(), variables, allow_unused=True, materialize_grads=True)
    directions = [normal(*x.shape, seed=5 + k) for k, x in enumerate(variables)]

    def along(step):
        x, z = (v.detach() + step * d for v, d in zip(variables, directions, strict=True))
        return energy(x, code.with_variables(z)).sum()

    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    assert slope.abs() > 1e-4
    torch.testing.assert_close(slope, (along(1e-5) - along(-1e-5)) / 2e-5, rtol=1e-6, atol=1e-8)
    images = images.detach()
    singles = [energy(images[[i]], code[[i]]) for i in range(COUNT)]
    torch.testing.assert_close(value, torch.cat(singles), rtol=1e-9, atol=1e-9)
    assert value.std() > 1e-4
    torch.testing.assert_close(energy(images, code), value, rtol=1e-12, atol=1e-12)  # nothing is drawn anew


ABOUT = {"": "", "FILE": "picture.png", "TEXT": "a red cat", "#rrggbb": "#ff8000", "FILE.py": "own.py"}
SAID = {"classifier": "label=1", "clip": "model=clip", "clip-image": "model=clip", "masked": "mask=mask.png"}
ELSEWHERE = {"face", "perceptual", "command"}  # networks from the net, and a program, which has no gradient


@pytest.fixture
def files(tmp_path, monkeypatch, clip_folder):
    """What energies may be about, in the folder in which the test runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clip").symlink_to(clip_folder)
    for name, values in {"picture": picture().movedim(0, -1), "mask": 2 * half() - 1}.items():
        Image.fromarray(np.uint8(127.5 * (values + 1))).save(f"{name}.png")
    (tmp_path / "own.py").write_text("def energy(images, code): return images.square().mean((1, 2, 3))")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(smooth().float()).save("several.pt")
        torch.jit.script(smooth(1).float()).save("one.pt")


@pytest.mark.parametrize("name", [name for name in ENERGIES if name not in ELSEWHERE])
def test_every_energy_that_is_listed_is_made_of_words(name, files):
    """Each by its name, what it is about, and the settings that it needs; a batch is its images, to float32."""
    about = ABOUT.get(ENERGIES[name][0], "one.pt" if "one output" in ENERGIES[name][0] else "several.pt")
    text = ":".join(filter(None, [name, about, SAID.get(name), "weight=2"]))
    made = of_words(text, Setting(read=lambda path: read_like(path, (3, SIDE, SIDE)), shape=(3, SIDE, SIDE)))
    assert [name] == [term.name.split(":")[0] for term in made.terms][:1]
    images, code = batch().requires_grad_(), a_code()
    variables = code.variables().requires_grad_()
    values = made(images, code.with_variables(variables))
    assert values.shape == (COUNT,)
    gradients = torch.autograd.grad(values.sum(), [images, variables], allow_unused=True, materialize_grads=True)
    assert sum(gradient.abs().sum() for gradient in gradients) > 0
    images = images.detach()
    alone = [made(images[[i]], code[[i]]) for i in range(COUNT)]
    torch.testing.assert_close(values, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_the_value_that_is_listed_is_the_usual_one(files, monkeypatch):
    """`near` goes by 1 / deviation^2."""
    setting, images = Setting(read=lambda path: read_like(path, (3, SIDE, SIDE)), shape=(3, SIDE, SIDE)), batch()
    before = of_words("near:picture.png", setting)(images, a_code())
    monkeypatch.setitem(ENERGIES, "near", ("FILE", "deviation=.5", ENERGIES["near"][2]))
    torch.testing.assert_close(of_words("near:picture.png", setting)(images, a_code()), 4 * before)
    with pytest.raises(PushforwardError, match=r"has no setting size; it takes deviation=\.5, weight=1"):
        of_words("near:picture.png:size=3", setting)


class Darkness(nn.Module):
    """Of images alone, as a network that looks at them."""

    def forward(self, images):
        return images.mean((1, 2, 3))


class Distance(nn.Module):
    """Of images and their codes."""

    def forward(self, images, code):
        return images.mean((1, 2, 3)) + code.start.flatten(1).sum(1)


@pytest.mark.parametrize("made", [lambda one: one, torch.jit.script], ids=["module", "script"])
def test_a_module_is_an_energy_by_what_its_forward_takes(made):
    images, code = batch(), Code(normal(COUNT, 5))
    expected = images.mean((1, 2, 3))
    torch.testing.assert_close(of(made(Darkness()))(images, code), expected.float(), check_dtype=False)
    torch.testing.assert_close(of(Distance())(images, code), expected + code.start.sum(1), check_dtype=False)
    assert of(made(nn.Sequential(Darkness(), nn.Identity())))(images, code).shape == (COUNT,)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_colour_is_that_of_a_picture_of_it(tmp_path, channels):
    """For a model of grey images, too, where a picture is made grey by how bright its colours are."""
    Image.new("RGB", (4, 4), (200, 30, 90)).save(tmp_path / "x.png")
    image = read_like(tmp_path / "x.png", (channels, 4, 4))[None]
    made = of_words("colour:#c81e5a", Setting(read=lambda _: torch.zeros(0), shape=(channels, 4, 4)))
    assert float(told(made, image)) == pytest.approx(0, abs=1e-9)
    assert float(told(made, image + 0.1)) == pytest.approx(channels / 2, rel=1e-4)


def test_a_program_may_be_told_more_than_a_name_is_long():
    """Code, for one; a file among its arguments is part of the energy, so each of them is tried as a name."""
    code = f"import sys; print(*range(1, len(sys.argv))) {'#' * 300}"
    made = of_words(f"command:{sys.executable} -c '{code}'", Setting(read=lambda _: torch.zeros(0), shape=(1, 4, 4)))
    assert made(torch.zeros(3, 1, 4, 4), Code(torch.zeros(3, 1))).tolist() == [1, 2, 3]


@pytest.mark.parametrize("place", ["./", "~/", ""])
def test_a_program_is_run_where_its_name_says_that_it_lies(tmp_path, monkeypatch, place):
    """As by a shell: here, at home, or by its bare name on the path alone."""
    script = tmp_path / "count.sh"
    script.write_text('#!/bin/sh\nfor file in "$@"; do echo 7; done\n')
    script.chmod(0o755)
    monkeypatch.chdir(tmp_path if place == "./" else tmp_path.parent)
    monkeypatch.setenv("HOME", str(tmp_path))
    setting = Setting(read=lambda _: torch.zeros(0), shape=(1, 4, 4))
    if not place:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(PushforwardError, match="There is no program"):
            of_words("command:count.sh", setting)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    made = of_words(f"command:{place}count.sh", setting)
    assert made(torch.zeros(2, 1, 4, 4), Code(torch.zeros(2, 1))).tolist() == [7, 7]


# -- beside a known image ---------------------------------------------------------------------------------------------


def told(energy, images):
    return energy(images, Code(torch.zeros(len(images), 1)))


def test_images_of_16_bits_are_summed_in_32():
    """By steering and by a call of one's own, as by guidance: 75000 is above float16's greatest number."""
    images = torch.full((COUNT, 3, 100, 100), 1.5, dtype=torch.float16)
    assert told(of(lambda images, code: (images + 1).sum((1, 2, 3)), "sum"), images).tolist() == [75000.0] * COUNT


def test_near_is_the_likelihood_of_gaussian_noise():
    images, image = batch(), picture()
    likelihood = torch.distributions.Normal(image, 0.3)
    expected = (likelihood.log_prob(image) - likelihood.log_prob(images)).sum((1, 2, 3))
    torch.testing.assert_close(told(near(image, deviation=0.3), images), expected)
    torch.testing.assert_close(told(near(image[None], deviation=0.3), images.float()), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_low_pass_knows_block_means_alone(channels):
    images, image = batch(channels=channels), picture(channels=channels)
    means = image.reshape(channels, 4, 2, 4, 2).mean((2, 4))
    expected = (images.reshape(-1, channels, 4, 2, 4, 2).mean((3, 5)) - means).square().sum((1, 2, 3)) / 2
    torch.testing.assert_close(told(low_pass(image, 4), images), expected)
    torch.testing.assert_close(told(low_pass(means), images), expected)  # a small image is a coarse one
    enlarged = images.repeat_interleave(3, 2).repeat_interleave(3, 3)
    torch.testing.assert_close(told(low_pass(means), enlarged), expected)


def test_masked_and_colour_look_where_the_mask_is():
    image, images, mask = picture(), batch(), half()
    changed = torch.where(mask.bool(), images, normal(*images.shape, seed=9))
    for energy in (masked(image, mask), colour((1.0, 0.0, -1.0), mask[None].bool())):
        torch.testing.assert_close(told(energy, changed), told(energy, images))
        assert (told(energy, images + 0.1) - told(energy, images)).abs().min() > 1e-3
    pasted = torch.where(mask.bool(), image, images)
    assert told(masked(image, mask), pasted).abs().max() == 0
    flat = torch.tensor([1.0, 0.0, -1.0]).reshape(1, 3, 1, 1).expand(2, 3, 5, 7) - 0.5
    torch.testing.assert_close(
        told(colour((1.0, 0.0, -1.0), deviation=0.5), flat), torch.full((2,), 1.5, dtype=torch.float64)
    )
    torch.testing.assert_close(
        told(colour(0.25), torch.zeros(2, 1, 4, 4)), torch.full((2,), (0.25 / 0.1) ** 2 / 2, dtype=torch.float64)
    )


def test_perceptual_is_any_distance_of_colour_images():
    """The distance is quadratic, so that central differences are exact; float32 rounding over a step of 0.1."""
    energy = perceptual(picture(channels=1, side=32), lambda a, b: (a - b).square().mean((1, 2, 3), keepdim=True))
    images, direction = batch(channels=1, side=32), normal(COUNT, 1, 32, 32, seed=4)
    value = told(energy, images.requires_grad_())
    torch.testing.assert_close(value.double(), (images - picture(channels=1, side=32)).square().mean((1, 2, 3)))
    (gradient,) = torch.autograd.grad(value.sum(), images)
    step = 0.1 * direction
    difference = (told(energy, images + step) - told(energy, images - step)).sum() / 2
    torch.testing.assert_close((gradient * step).sum(), difference.double(), rtol=1e-4, atol=1e-5)


# -- networks ---------------------------------------------------------------------------------------------------------


def test_clip_energies_are_one_less_cosines(clip):
    images, seen = batch(), views(3)
    plain = 1 - clip.similarity(images, "a blue dog")
    torch.testing.assert_close(told(clip_text(clip, "a blue dog"), images), plain)
    averaged = 1 - clip.similarity(seen(images), "a blue dog").reshape(COUNT, 3).mean(1)
    torch.testing.assert_close(told(clip_text(clip, "a blue dog", views=seen), images), averaged)
    assert (plain - averaged).abs().max() > 1e-3
    assert told(clip_image(clip, images[1]), images)[1].abs() < 1e-12  # rounding
    assert told(clip_image(clip, images[1]), images)[0] > 1e-4


def test_likelihoods_of_labels_and_attributes():
    net, images = smooth(), batch()
    labels = torch.full((COUNT,), 2)
    torch.testing.assert_close(
        told(classifier(Classifier(net, ("a", "b", "c", "d")), "C"), images),
        cross_entropy(net(images), labels, reduction="none"),
    )
    with_it, without_it = (told(attribute(net, 1, wanted=w), images) for w in (True, False))
    truth = binary_cross_entropy_with_logits(net(images)[:, 1], torch.ones(COUNT).double(), reduction="none")
    torch.testing.assert_close(with_it, truth)
    torch.testing.assert_close(torch.exp(-with_it) + torch.exp(-without_it), torch.ones(COUNT).double())
    single = told(attribute(lambda x: net(x)[:, 1]), images)  # a head of one attribute
    torch.testing.assert_close(single, with_it)
    certain = told(attribute(lambda x: -1e4 + 0 * x.mean((1, 2, 3))), images)
    torch.testing.assert_close(certain, torch.full((COUNT,), 1e4).double())  # no log of 0


def test_scores_and_identities():
    net, images = smooth(1), batch()
    torch.testing.assert_close(told(score(net), images), -net(images)[:, 0])
    torch.testing.assert_close(told(score(lambda x: net(x)[:, 0], low=True), images), net(images)[:, 0])
    net = smooth()
    found, wanted = net(images), net(images[:1])
    torch.testing.assert_close(told(identity(net, images[0], metric="euclidean"), images), (found - wanted).norm(dim=1))
    cosine = (found * wanted).sum(1) / (found.norm(dim=1) * wanted.norm(dim=1))
    torch.testing.assert_close(told(identity(net, images[0]), images), 1 - cosine)


def test_classes_are_found_by_name():
    known = Classifier(smooth(), ("tabby, tabby cat", "Cat", "crane", "crane"))
    assert [known.number(label) for label in ("tabby cat", "cat", "1", 3, "TABBY, tabby cat")] == [0, 1, 1, 3, 0]
    for label, said in {
        "dog": "no class 'dog'; it knows: tabby",
        "crane": "2 classes",
        "4": "0 to 3",
        -1: "got -1",
    }.items():
        with pytest.raises(PushforwardError, match=said):
            known.number(label)
    with pytest.raises(PushforwardError, match="have no names: give a number"):
        Classifier(smooth()).number("cat")


def test_views_are_the_same_for_all_images_and_calls():
    seen, images = views(20, seed=3), batch(2, side=16)
    found = seen(images)
    assert found.shape == (40, 3, 16, 16)
    assert torch.equal(found, seen(images))
    torch.testing.assert_close(found, torch.cat([seen(images[:1]), seen(images[1:])]))
    assert min((found[i] - found[j]).abs().max() for i in range(20) for j in range(i)) > 0.05  # all differ
    assert (found - views(20, seed=4)(images)).abs().max() > 0.1
    middle = seen(images.mean(0, keepdim=True))  # no clipping: a view of the mean is the mean of views
    torch.testing.assert_close(middle, found.unflatten(0, (2, 20)).mean(0))


def test_views_are_those_that_are_described():
    """200 views of a black image and of one with a dot: what is changed, and by how much at most."""
    side, count = 32, 200
    seen = views(count)
    black = (seen(torch.full((1, 3, side, side), -1.0)) + 1) / 2
    inside = black.abs() > 1e-6  # brightness there; black around the image and in the hole
    brightness = black.flatten(1).gather(1, black.flatten(1).abs().argmax(1, keepdim=True))
    assert 0.4 < brightness.max() <= 0.5
    assert -0.5 <= brightness.min() < -0.4
    lost = 1 - inside.float().mean((1, 2, 3))
    assert lost.min() > 0.05  # of the hole at least a corner's quarter, 1/16, is within
    assert 0.2 < lost.median() < lost.max() < 1 - (0.8 * 0.9) ** 2 + 0.25
    dot = torch.full((1, 3, side, side), -1.0)
    dot[:, 0, 15:17, 15:17] = 1
    moved = ((seen(dot) + 1) / 2 - black)[:, 0]
    there = moved.flatten(1).amax(1) > 0.2  # neither cut out nor made grey
    place = moved.flatten(1).argmax(1)[there]
    shift = torch.stack([place // side, place % side], 1).float() - 15.5
    assert there.float().mean() > 0.4
    assert shift.abs().max() <= side / 8 * 1.2 + 1.5  # an eighth, magnified; and the dot's own size
    assert shift.abs().amax(0).min() > side / 8 - 1.5
    assert shift.mean(0).abs().max() < 1


# -- classifiers and faces from files ---------------------------------------------------------------------------------


def a_vit(path, cls="ViTForImageClassification", **settings):
    """A tiny random transformer for images of 16 x 16 that classifies, as `transformers` writes it."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4,
        id2label={0: "cat", 1: "dog", 2: "red fox"},
    )  # fmt: skip
    torch.manual_seed(1)
    model = getattr(transformers, cls)(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    about = {"image_mean": [0.48, 0.45, 0.4], "image_std": [0.27, 0.26, 0.25], "resample": 2, **settings}
    (path / "preprocessor_config.json").write_text(json.dumps(about))
    return model.eval()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("ViT", {"size": {"height": 16, "width": 16}}),
        ("ConvNext", {"size": {"shortest_edge": 16}, "crop_pct": 0.875, "resample": 3}),
        ("ConvNext", {"size": 16, "crop_pct": 0.875, "resample": 3}),
        ("CLIP", {"size": {"shortest_edge": 14}, "do_center_crop": True, "crop_size": 16, "resample": 3}),
    ],
)
def test_a_classifier_of_transformers_sees_what_its_processor_shows(tmp_path, kind, settings):
    """The processor rounds to 8 bits: one step of 1 / 255 over the deviation 0.25, where nothing overshoots."""
    import transformers

    model = a_vit(tmp_path, image_processor_type=f"{kind}ImageProcessor", **settings)
    y, x = torch.meshgrid(torch.linspace(0, 3, 37), torch.linspace(0, 4, 50), indexing="ij")
    colours = torch.stack([(x + y).sin(), (x * y / 3).cos(), (x - y).sin()]) * 0.8
    image = ((colours + 1) * 127.5).round().byte()
    name = f"{kind}ImageProcessor"
    processor = (getattr(transformers, name + "Pil", None) or getattr(transformers, name)).from_pretrained(tmp_path)
    theirs = torch.as_tensor(
        np.stack(processor(images=[Image.fromarray(image.permute(1, 2, 0).numpy())])["pixel_values"])
    )
    shown = []
    model_class = type(model)
    forward = model_class.forward
    found = load_classifier(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            model_class,
            "forward",
            lambda self, pixel_values: (shown.append(pixel_values), forward(self, pixel_values))[1],
        )
        logits = found.logits(image[None] / 127.5 - 1)
    assert (shown[0] - theirs).abs().max() < 1.01 / 255 / 0.25
    torch.testing.assert_close(logits, model(pixel_values=shown[0]).logits, rtol=1e-5, atol=1e-5)  # float32
    assert found.labels == ("cat", "dog", "red fox")
    images = batch(2, side=20).requires_grad_()  # float64, of another size
    value = told(classifier(found, "red fox"), images)
    (gradient,) = torch.autograd.grad(value.sum(), images)
    down = told(classifier(found, "red fox"), images.detach() - 0.01 * gradient / gradient.abs().amax())
    assert down.sum() < value.sum()
    assert found.logits(batch(2, channels=1)).shape == (2, 3)


@pytest.mark.parametrize("fault", ["no folder", "no head", "no preprocessor", "no mean", "no file", "damaged"])
def test_what_is_no_classifier_is_refused(tmp_path, fault):
    place = tmp_path
    if fault == "no folder":
        place = tmp_path / "nowhere"
    elif fault == "no file":
        place = tmp_path / "net.pt"
    elif fault == "damaged":
        place = tmp_path / "net.pt"
        place.write_bytes(b"no network")
    else:
        a_vit(tmp_path, "ViTModel" if fault == "no head" else "ViTForImageClassification", size=16)
    if fault == "no preprocessor":
        (tmp_path / "preprocessor_config.json").unlink()
    elif fault == "no mean":
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 16}))
    said = {
        "no folder": "cannot be read as an image classifier",
        "no head": "trained to classify",
        "no preprocessor": "cannot be read",
        "no mean": "lacks size",
        "no file": "There is no file",
        "damaged": "not a TorchScript file",
    }
    with pytest.raises(PushforwardError, match=said[fault]) as caught:
        load_classifier(place)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("load", [load_clip, load_classifier])
def test_a_hub_without_an_answer_is_asked_once(load):
    """`transformers` asks it for half a minute."""
    with pytest.raises(PushforwardError, match="the hub gives no answer") as caught:
        load("someone/network")
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named(monkeypatch):
    without(monkeypatch, "transformers")
    with pytest.raises(PushforwardError, match=r"pip install 'pushforward\[diffusers\]'"):
        load_classifier("somewhere")


def test_torchscript_and_fashion(tmp_path):
    """Both in float32, of values near 1."""
    net, images = smooth().float(), batch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(net).save(str(tmp_path / "net.pt"))
    found = load_classifier(tmp_path / "net.pt")
    torch.testing.assert_close(found.logits(images), net(images.float()), rtol=1e-5, atol=1e-5)
    assert found.labels == ()
    fashion = load_classifier("fashion")
    trouser = torch.full((1, 1, 28, 28), -1.0)
    trouser[..., 2:26, 8:20] = 0.6
    trouser[..., 8:26, 13:15] = -1
    assert fashion.number("ankle boot") == 9
    assert fashion.logits(trouser).argmax() == fashion.number("trouser")
    with pytest.raises(PushforwardError, match=r"of 32x32, 3 channels\. Take a model of such images"):
        fashion.logits(torch.zeros(1, 3, 32, 32))
    energy = classifier(fashion, "sandal")
    images = trouser.requires_grad_()
    (gradient,) = torch.autograd.grad(told(energy, images).sum(), images)
    assert told(energy, images.detach() - 0.05 * gradient.sign()) < told(energy, images) - 1


def face_tensors(seed=0):
    """Random weights by the names of face-api.js, scaled to keep activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {"fc": torch.randn(256, 128, generator=generator) / 16}

    def convolution(name, out, channels, size):
        deviation = (2 / (channels * size**2)) ** 0.5
        tensors[f"{name}/conv/filters"] = torch.randn(out, channels, size, size, generator=generator) * deviation
        for what in ("conv/bias", "scale/biases"):
            tensors[f"{name}/{what}"] = torch.randn(out, generator=generator) / 10
        tensors[f"{name}/scale/weights"] = 0.5 + torch.rand(out, generator=generator)

    convolution("conv32_down", 32, 3, 7)
    before = 32
    for width, names in {32: "1 2 3", 64: "down 1 2 3", 128: "down 1 2", 256: "down 1 2 down_out"}.items():
        for name in names.split():
            convolution(f"conv{width}_{name}/conv1", width, before, 3)
            convolution(f"conv{width}_{name}/conv2", width, width, 3)
            before = width
    return tensors


def plain_faces(tensors, x):
    """The same network written as face-api.js runs it, unfolded, of images of 150 x 150 in [0, 255]."""

    def convolution(x, name, stride=1, padding=1):
        get = lambda what: tensors[f"{name}/{what}"].to(x)  # noqa: E731
        x = nn.functional.conv2d(x, get("conv/filters"), get("conv/bias"), stride, padding)
        return x * get("scale/weights")[:, None, None] + get("scale/biases")[:, None, None]

    x = (x - torch.tensor([122.782, 117.001, 104.298]).to(x)[:, None, None]) / 256
    x = max_pool2d(convolution(x, "conv32_down", 2, 0).relu(), 3, 2)
    for width, names in {32: "1 2 3", 64: "down 1 2 3", 128: "down 1 2", 256: "down 1 2 down_out"}.items():
        for name in names.split():
            down = name.startswith("down")
            y = convolution(x, f"conv{width}_{name}/conv1", *((2, 0) if down else (1, 1))).relu()
            y = convolution(y, f"conv{width}_{name}/conv2")
            x = avg_pool2d(x, 2) if down else x
            if y.shape[2] < x.shape[2]:
                y = pad(y, (0, 1, 0, 1))
            if x.shape[1] < y.shape[1]:
                x = torch.cat([x, torch.zeros_like(x)], 1)
            x = (x + y).relu()
    return x.mean((2, 3)) @ tensors["fc"].to(x)


def test_faces_are_read_and_described(tmp_path):
    """Equal to the network written out, in float64; central differences of 1e-7 pass few kinks of ReLUs: 1e-3."""
    tensors = face_tensors()
    safetensors.torch.save_file(tensors, tmp_path / "dlib_face_resnet.safetensors")
    net = load_faces(tmp_path)
    assert isinstance(net, FaceNet)
    assert not any(parameter.requires_grad for parameter in net.parameters())
    net = net.double()
    images = batch(2, side=150).clamp(-1, 1)
    found = net(images)
    assert found.shape == (2, 128)
    tensors = {name: value.double() for name, value in tensors.items()}
    torch.testing.assert_close(
        found, plain_faces(tensors, (images + 1) * 127.5), rtol=1e-5, atol=1e-5
    )  # folded in float32
    assert (found[0] - found[1]).norm() > 0.05
    energy, x, d = identity(net, images[0], metric="euclidean"), batch(1, 1, 20), normal(1, 1, 20, 20, seed=8)
    (gradient,) = torch.autograd.grad(told(energy, x.requires_grad_()).sum(), x)
    slope = (told(energy, x + 1e-7 * d) - told(energy, x - 1e-7 * d)).sum() / 2e-7
    torch.testing.assert_close((gradient * d).sum(), slope, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("fault", ["missing", "damaged", "other", "lacks", "shape"])
def test_what_are_no_faces_is_refused(tmp_path, fault):
    file, tensors = tmp_path / "net.safetensors", face_tensors()
    if fault == "other":
        tensors = {"weight": torch.zeros(2)}
    elif fault == "lacks":
        del tensors["conv64_1/conv2/scale/biases"]
    elif fault == "shape":
        tensors["conv32_down/conv/filters"] = torch.zeros(32, 1, 7, 7)
    if fault != "missing":
        safetensors.torch.save_file(tensors, file)
    if fault == "damaged":
        file.write_bytes(file.read_bytes()[:100_000])
    said = {"missing": "There is no file", "damaged": "damaged", "other": "no tensor 'fc'",
            "lacks": "no tensor 'conv64_1/conv2/scale/biases'", "shape": "other shapes"}  # fmt: skip
    with pytest.raises(PushforwardError, match=said[fault]):
        load_faces(file)


# -- codes ------------------------------------------------------------------------------------------------------------


def of_code(energy, z):
    return energy(torch.zeros(len(z), 1, 1, 1), Code(z))


def test_gaussian_and_chi_are_log_densities():
    """Up to constants; chi's in float32 of a code of 200,000 numbers, too, to 1e-3 of a value near 0.5."""
    code = a_code()
    z = code.variables()
    images = batch()
    density = torch.distributions.Normal(0.0, 1.0)
    expected = (density.log_prob(torch.zeros_like(z)) - density.log_prob(z)).sum(1)
    torch.testing.assert_close(gaussian()(images, code), expected)
    squares, d = z.square().sum(1), z.shape[1]
    log_chi = torch.distributions.Chi2(torch.tensor(d).double()).log_prob(squares) + squares.log() / 2  # times 2 |z|
    found = chi()(images, code)
    torch.testing.assert_close(found - found[0], log_chi[0] - log_chi)
    best = z * ((d - 1) / squares).sqrt()[:, None]
    assert of_code(chi(), best).abs().max() < 1e-12
    long = normal(2, 200_000, seed=7)
    exact = of_code(chi(), long)
    assert exact.min() > 0
    torch.testing.assert_close(of_code(chi(), long.float()).double(), exact, rtol=1e-3, atol=1e-3)


def test_concentration_is_its_equations():
    """A constant code c: mean of norm c sqrt(k), covariance c^2 1 1^T, in any order."""
    k, m = 4, 16
    bounds = m * 4 * k / (2 * k) + m * (math.sqrt(1 + 15) - 1 - math.sqrt(k / m)) ** 2 / 2
    expected = 2 * (bounds - 2 * math.log(2))  # the code as it is, and the shuffles' mean
    found = of_code(concentration(shuffles=2), torch.full((1, k * m + 3), 2.0).double())  # the rest is left out
    torch.testing.assert_close(found, torch.tensor([expected]).double())


def test_concentration_leaves_gaussian_codes_and_finds_others():
    """Of Gaussian codes the mean's bound is below 1 for a quarter, chi-squared of 4 above 8 log 2, and by little."""
    energy, z = concentration(shuffles=5), normal(40, 1024, seed=3)
    usual = of_code(energy, z)
    assert usual.mean() < 0.15
    repeated = z[:, :16].repeat(1, 64)
    for other in (1.3 * z, z + 0.3, repeated):
        assert of_code(energy, other).min() > 1 > usual.max()
    assert not torch.equal(
        of_code(concentration(shuffles=1, seed=1), 1.3 * z), of_code(concentration(shuffles=1), 1.3 * z)
    )


# -- what does not fit ------------------------------------------------------------------------------------------------

WRONG = {
    "a batch": (lambda: near(batch()), "takes one image"),
    "bytes": (lambda: near(torch.zeros(3, 8, 8, dtype=torch.uint8)), "numbers in \\[-1, 1\\]"),
    "large": (lambda: low_pass(picture() * 255), "x / 127.5 - 1"),
    "deviation": (lambda: near(picture(), deviation=0.0), "must be positive; got 0"),
    "size": (lambda: told(near(picture(side=9)), batch()), "resize it to their shape"),
    "channels": (lambda: told(low_pass(picture(channels=1), 2), batch()), "1 channels and the images have 3"),
    "cells": (lambda: low_pass(picture(), 9), "9x9 cells, which do not fit into images of 8x8"),
    "mask": (lambda: masked(picture(), torch.ones(8, 9)), "as large as its image; they are 8x9 and 8x8"),
    "no mask": (lambda: masked(picture(), torch.zeros(8, 8)), "1 somewhere and 0 elsewhere"),
    "colour": (lambda: colour((0.1, 0.2)), "1 or 3 numbers"),
    "colour's mask": (lambda: told(colour(0.1, torch.ones(5, 5)), batch()), "5x5 and the images are 8x8"),
    "small": (lambda: told(perceptual(picture()), batch()), "at least 32x32"),
    "logits": (lambda: told(classifier(lambda x: x, 0), batch()), "must give logits"),
    "class": (lambda: told(classifier(smooth(), 4), batch()), "with a class 4"),
    "score": (lambda: told(score(smooth(2)), batch()), "one number per image"),
    "embedding": (lambda: identity(lambda x: x, picture()), "must embed 1 images"),
    "views": (lambda: views(0), "at least 1 view"),
    "uneven": (lambda: told(score(smooth(1), views=lambda x: x[:2]), batch()), "the same number of views"),
    "face": (lambda: FaceNet()(torch.zeros(3, 8, 8)), "The face network takes images"),
    "one number": (lambda: of_code(chi(), torch.ones(2, 1)), "Use 'gaussian'"),
    "short": (lambda: of_code(concentration(), torch.ones(2, 15)), "codes of 16 numbers; these have 15"),
    "shuffles": (lambda: concentration(shuffles=0), "at least 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_said(name):
    wrong, said = WRONG[name]
    with pytest.raises(PushforwardError, match=said) as caught:
        wrong()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "function",
    [
        lambda images: images.mean((1, 2, 3)),
        lambda images, scale=1.0: scale * images.mean((1, 2, 3)),
        lambda images, code=None: images.mean((1, 2, 3)) + 0 * code.start.sum(),
        lambda images, code: images.mean((1, 2, 3)) + 0 * code.start.sum(),
        lambda *both: both[0].mean((1, 2, 3)) + 0 * both[1].start.sum(),
    ],
)
def test_an_energy_may_take_the_images_alone(function):
    images, code = normal(3, 1, 4, 4), Code(normal(3, 1, 4, 4))
    torch.testing.assert_close(of(function)(images, code).double(), images.mean((1, 2, 3)))
