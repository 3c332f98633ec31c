"""Watermarks: the law of marked codes, what is read from them, its p-values, and the commands."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import kstest

import pushforward as pf
from pushforward.linear import VP
from pushforward.maps.storage import load_codes
from pushforward.maps.watermark import Bits, Ring, longest, read
from support.cli import invoke, refused
from support.helpers import mixture_denoiser, normal
from support.models import saved

SHAPE = (1, 16, 16)
WORDS = ["--steps", "5", "-q"]


PROCESSES = {one.name: one for one in (VP(), pf.VE(), pf.Flow(), pf.Langevin(), pf.Blurring(field=SHAPE[1:]))}


def mixture(process: str = "vp") -> pf.Model:
    """A model of images that are three points with much around them, in closed form."""
    own = PROCESSES[process]
    return pf.Model("mixture", own, mixture_denoiser(own, normal(3, *SHAPE, seed=0), 0.5), SHAPE)


def patterns(key: bytes) -> list:
    return [lambda z: Bits(key, 2).embed(z, b"me"), Ring(key).embed]


# -- patterns ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [0, 1], ids=["bits", "ring"])
def test_marked_codes_are_standard_normal_over_keys(kind):
    """Each entry, any two of them, and the sum of their squares, for one message, seed and variant."""
    z = normal(600, 1, 8, 16, seed=1).float()
    codes = torch.cat([patterns(f"key {k}".encode())[kind](z[k : k + 1]) for k in range(len(z))]).double().flatten(1)
    assert kstest(codes.flatten().numpy(), "norm").pvalue > 0.01
    for entry in (0, 1, 77):
        assert kstest(codes[:, entry].numpy(), "norm").pvalue > 0.01
    gaps = (codes.T @ codes / len(codes) - torch.eye(codes.shape[1])).flatten()
    assert abs(float(gaps.std()) * len(codes) ** 0.5 - 1) < 0.02
    assert float(gaps.abs().max()) * len(codes) ** 0.5 < 6
    assert kstest(codes.square().sum(1).numpy(), "chi2", args=(codes.shape[1],)).pvalue > 0.01


def test_signs_are_all_that_bits_change():
    z = normal(3, *SHAPE).float()
    marked = Bits(b"key", 3).embed(z, b"abc")
    assert torch.equal(marked.abs(), z.abs())
    assert not torch.equal(marked, Bits(b"kez", 3).embed(z, b"abc"))


def test_images_of_one_message_differ_in_signs():
    """Images take the variants in turn, whatever the batch they are drawn in."""
    z = normal(1, *SHAPE).float().expand(20, *SHAPE)
    marked = Bits(b"key", 1).embed(z, b"a")
    agree = (marked[:1].sign() == marked.sign()).double().flatten(1).mean(1)
    assert (agree == 1).nonzero().flatten().tolist() == [0, 8, 16]
    assert torch.equal(Bits(b"key", 1).embed(z[3:5], b"a", first=3), marked[3:5])


@pytest.mark.parametrize("message", [b"\x00", b"me", b"\xff\x00\x80\x7f"])
def test_messages_are_read_from_noisy_codes(message):
    """The correlation is .5; the length need not be known."""
    marked = Bits(b"key", len(message)).embed(normal(9, 2, 16, 16).float(), message)
    noisy = 0.5 * marked + 0.75**0.5 * normal(9, 2, 16, 16, seed=1).float()
    found = read(Bits(b"key", len(message)), noisy[None], message)
    assert found.message == [message] * 9
    assert bool((found.correct == 1).all())
    assert bool(found.marked(1e-3).all())
    if len(message) < 4:
        unknown = read([Bits(b"key", n) for n in range(1, 4)], torch.stack([-noisy.flip(3), noisy]))
        assert unknown.message == [message] * 9
        assert unknown.view.tolist() == [1] * 9


@pytest.mark.parametrize("message", [b"me", None])
def test_another_key_is_no_more_likely_than_chance(message):
    """For one image and many keys: bits are fair coins, and p-values no smaller than they may be."""
    views = normal(2, 4, *SHAPE).float()
    found = [read(Bits(f"key {k}".encode(), 2, variants=3), views, message) for k in range(250)]
    p_values = torch.stack([one.p_value for one in found]).flatten()
    for rate in (0.01, 0.1, 0.5):
        assert float((p_values <= rate).double().mean()) < rate + 3 * (rate / len(p_values)) ** 0.5
    if message is not None:
        right = torch.stack([one.correct for one in found])[:, 0] * 16
        assert abs(float(right.mean()) - 8) < 3 * (4 / 250) ** 0.5
        assert abs(float(right.var()) - 4) < 1.2


def test_a_rings_p_values_are_uniform_under_other_keys():
    views = normal(1, 1, *SHAPE).float()
    p_values = [float(read(Ring(f"key {k}".encode(), variants=1), views).p_value) for k in range(500)]
    assert kstest(p_values, "uniform").pvalue > 0.01
    marked = Ring(b"key").embed(normal(9, *SHAPE).float())
    assert bool(read(Ring(b"key"), (marked + 0.5 * normal(9, *SHAPE, seed=1).float())[None]).marked(1e-3).all())


def test_what_a_code_cannot_hold_is_refused():
    z = normal(1, *SHAPE).float()
    assert longest(SHAPE) == 4
    with pytest.raises(pf.PushforwardError, match="hold a message of 1 to 4 bytes; got 5"):
        Bits(b"key", 5).embed(z, b"12345")
    with pytest.raises(pf.PushforwardError, match="The pattern holds 2 bytes; got 1"):
        Bits(b"key", 2).embed(z, b"1")
    with pytest.raises(pf.PushforwardError, match="needs a key"):
        Ring(b"")
    assert "secret" not in repr(Bits(b"secret", 1))


# -- images ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (2, 64), (128,)], ids=["video", "sound", "numbers"])
def test_whatever_a_model_makes_carries_messages(shape):
    model = pf.Model("made", VP(), mixture_denoiser(VP(), normal(3, *shape), 0.5), shape)
    found = model.read_watermark(model.watermark(3, key="key", message=b"m").images, key="key", message=b"m")
    assert float(found.correct.mean()) == 1
    if len(shape) > 2:
        assert bool(model.read_watermark(model.watermark(3, key="key").images, key="key", ring=True).marked(1e-3).all())
    else:
        with pytest.raises(pf.PushforwardError, match="A ring is of frequencies along height and width"):
            model.watermark(3, key="key")
    with pytest.raises(pf.PushforwardError, match="A crop takes at most 0 pixels"):
        model.read_watermark(torch.zeros(1, *shape), key="key", crops=1)


def test_codes_too_small_for_a_message_are_refused():
    model = pf.Model("small", VP(), mixture_denoiser(VP(), normal(3, 1, 4, 4), 0.5), (1, 4, 4))
    for ask in (lambda: model.watermark(1, key="key", message="m"),
                lambda: model.read_watermark(torch.zeros(1, 1, 4, 4), key="key")):  # fmt: skip
        with pytest.raises(pf.PushforwardError, match="has 16 numbers, which are too few for a message"):
            ask()


@pytest.mark.parametrize("process", PROCESSES)
def test_images_carry_messages_on_every_process(process):
    """Drawn by one solver and read by another; with a little noise, too."""
    model = mixture(process)
    marked = model.watermark(4, key="key", message=b"m", solver="dpm++", steps=20, seed=3)
    assert torch.equal(marked.pushforward.decode(marked.code), marked.images)
    assert len(repr(marked).splitlines()) == 1
    for noise in (0.0, 0.05):
        images = marked.images + noise * normal(*marked.images.shape).float()
        found = model.read_watermark(images, key="key", message=b"m")
        assert float(found.correct.mean()) == 1
        assert bool(found.marked(0.02).all())
    assert not bool(model.read_watermark(images, key="kez", message=b"m").marked(1e-3).any())


def test_batches_change_nothing():
    model = mixture()
    marked = model.watermark(5, key="key", message="m", steps=5, first=2)
    again = model.watermark(2, key=b"key", message=b"m", steps=5, first=4, batch=1)
    assert (marked.images[2:4] - again.images).abs().max() < 1e-5
    one, all_ = (model.read_watermark(marked.images, key="key", batch=batch) for batch in (2, 64))
    assert one.message == all_.message
    assert (one.evidence - all_.evidence).abs().max() < 1e-3


def test_crops_are_undone():
    """What is left of an image is brought to its size again; rings and bits are found where plain reading is lost."""
    model = pf.load("fashion-vp")
    images = model.watermark(3, key="key", message=b"m", steps=10, labels="shirt").images
    small = torch.nn.functional.interpolate(images[..., 2:, :26], (28, 28), mode="bicubic", antialias=True)
    plain, sought = (model.read_watermark(small, key="key", message=b"m", crops=crops, steps=8) for crops in (0, 2))
    assert float(sought.correct.mean()) == 1
    assert bool((sought.evidence > plain.evidence).all())


def test_shifts_are_undone():
    """An image moved by two pixels, and repeated at the border, is lost to plain reading, and found by its shift."""
    model = pf.load("fashion-vp")
    images = model.watermark(1, key="key", message=b"m", steps=10, labels="shirt").images
    moved = torch.nn.functional.pad(images, (2, -2, -1, 1), "replicate")
    sought = model.read_watermark(moved, key="key", message=b"m", shifts=2, steps=8)
    assert float(sought.correct.mean()) == 1
    assert bool(sought.marked(1e-3).all())
    assert not bool(model.read_watermark(moved, key="key", message=b"m", steps=8).marked(1e-3).any())
    assert not bool(model.read_watermark(moved, key="other", message=b"m", shifts=2, steps=8).marked(1e-3).any())


def test_arguments_that_do_not_fit_are_refused():
    model, images = mixture(), torch.zeros(1, *SHAPE)
    with pytest.raises(pf.PushforwardError, match="A ring carries no message"):
        model.read_watermark(images, key="key", ring=True, length=1)
    with pytest.raises(pf.PushforwardError, match="needs a key"):
        model.watermark(1, key="")
    with pytest.raises(pf.PushforwardError, match="draws noises that hide the mark"):
        model.watermark(1, key="key", solver="ddpm")
    with pytest.raises(pf.PushforwardError, match="a batch of at least 1; got 1 and 0"):
        model.watermark(1, key="key", batch=0)
    with pytest.raises(pf.PushforwardError, match="a batch of at least 1; got 1 and 0"):
        model.read_watermark(images, key="key", batch=0)
    for crops in (-1, SHAPE[-1]):
        with pytest.raises(pf.PushforwardError, match=f"pixels of a side of {SHAPE[-1]}; got {crops}"):
            model.read_watermark(images, key="key", crops=crops)
        with pytest.raises(pf.PushforwardError, match=f"shift goes by at most .*; got {crops}"):
            model.read_watermark(images, key="key", shifts=crops)
    with pytest.raises(pf.PushforwardError, match="no image here"):
        model.read_watermark(images[:0], key="key")
    calls: list[object] = []
    with pytest.raises(pf.PushforwardError, match=r"hold a message of 1 to .*; got 99"):
        model.read_watermark(images, key="key", message=b"m" * 99, callback=calls.append)
    assert not calls  # it is said before all work


# -- commands ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    """A model, and images of it that carry a message."""
    folder = tmp_path_factory.mktemp("marked")
    (folder / "key").write_text("my secret\n")
    model = saved(VP(), folder / "tiny")
    done = invoke("watermark-embed", model, "--key", folder / "key", "--message", "0x9d", "--count", 3, "--out",
                  folder / "out", "--json", folder / "report.json", *WORDS)  # fmt: skip
    assert done.exit_code == 0, done.exception
    return model, folder


def test_what_embed_writes(marked):
    _, folder = marked
    code, info = load_codes(folder / "out" / "codes.safetensors")
    assert info["watermark"] == {"kind": "bits", "message": "0x9d"}
    report = json.loads((folder / "report.json").read_text())
    assert (report["count"], report["bits"], report["message"]) == (3, 8, "0x9d")
    for file in (folder / "report.json", folder / "out" / "codes.safetensors"):
        assert b"my secret" not in file.read_bytes()
    assert read(Bits(b"my secret", 1), code.start[None]).message == [b"\x9d"] * 3
    assert invoke("decode", folder / "out" / "codes.safetensors", "--each", folder / "again", "--out",
                  folder / "all.png", "-q").exit_code == 0  # fmt: skip
    for i in range(3):
        first, second = (np.array(Image.open(folder / name / f"0000{i}.png"), int) for name in ("out", "again"))
        assert np.abs(first - second).max() <= 1


def test_marked_images_do_not_join_those_of_an_earlier_run(marked, tmp_path):
    model, folder = marked
    shutil.copytree(folder / "out", tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    fewer = invoke("watermark", "embed", model, "--key", "my secret", "--count", 2, "--out", tmp_path / "out", "-q")
    assert "holds 1 numbered image beyond the 2" in str(fewer.exception)
    (tmp_path / "out" / "00003.png").write_bytes(b"")
    again = ["--out", tmp_path / "x.png", "--each", tmp_path / "out", "-q"]
    decoded = invoke("decode", folder / "out" / "codes.safetensors", *again)
    assert "holds 1 numbered image beyond the 3" in str(decoded.exception)
    assert {path: path.read_bytes() for path in before} == before


def test_two_words_are_a_command(marked):
    model, folder = marked
    files = [folder / "out" / f"0000{i}.png" for i in range(3)]
    words = [*files, "--key", "my secret", "--message", "0x9d", *WORDS[:2]]
    done = invoke("watermark", "read", model, *words)
    assert done.exit_code == 0, done.exception
    assert "of 3 marked, at a false-positive rate of 0.001" in done.output
    assert invoke("watermark-read", model, *words).exit_code == 0
    report = json.loads(invoke("watermark", "read", model, *words, "-q", "--json", "-").output)
    assert {image["name"] for image in report["images"]} == {str(file) for file in files}
    assert all(0 <= image["bit_accuracy"] <= 1 and 0 <= image["p_value"] <= 1 for image in report["images"])
    assert "my secret" not in json.dumps(report)


def test_images_of_another_size_are_resized_and_that_is_said(marked, tmp_path):
    model, _ = marked
    Image.new("RGB", (31, 20)).save(tmp_path / "a.png")
    done = invoke("watermark", "read", model, tmp_path / "a.png", "--key", "k", *WORDS[:2])
    assert done.exit_code == 0, done.exception
    assert "not marked" in done.output
    assert len(done.output.splitlines()) > 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["embed", "M", "--key", "k", "--message", "m" * 99], "hold a message of 1 to"),
        (["embed", "M", "--key", ""], "The key is empty"),
        (["embed", "M", "--key", "k", "--message", ""], "The message is empty"),
        (["embed", "M", "--key", "k", "--message", "0x9"], "pairs of hexadecimal digits"),
        (["embed", "M", "--key", "k", "--solver", "rk45"], "chooses its steps"),
        (["read", "M", "I", "--key", "k", "--ring", "--length", "1"], "A ring carries no message"),
        (["read", "M", "I", "--key", "k", "--rate", "0"], "between 0 and 1"),
    ],
)
def test_what_commands_refuse(marked, words, said):
    model, folder = marked
    named = {"M": model, "I": folder / "out" / "00000.png"}
    result = invoke("watermark", *(named.get(word, word) for word in words))
    refused(result, said)
