"""Captions: words as numbers, parts hidden in training, captions read from files, and models that read prompts."""

import json
import random
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import pushforward as pf
from pushforward.data.datasets import ImageData, load_images
from pushforward.errors import PushforwardError
from pushforward.linear import VP
from pushforward.model import trained as trained_model
from pushforward.model.backbone import Backbone, preset
from pushforward.model.tokens import LENGTH, tokens
from pushforward.training.batches import hide_parts
from pushforward.training.trainer import TrainConfig, train
from support.cli import invoke, refused
from support.pictures import pixels, save_png
from support.training import SIDE, TINY

ROWS = 4096
CAPTIONS = ("red cat, big", "blue dog, small", "red dog", "blue cat, big, wet")


def captioned(count=8, labels=None):
    images = torch.randint(0, 256, (count, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(0)).byte()
    captions = tuple(CAPTIONS[i % 4] for i in range(count))
    return ImageData(images, labels, () if labels is None else ("a", "b"), captions=captions)


# -- sketches


DEEP = TrainConfig(network="deep", steps=1, batch=8, precision="no", sample_every=0)


def colours(count, width=SIDE):
    """Images of one colour each, a little noisy, and captions that name it; a tenth of all is blue."""
    noise = torch.randint(-20, 21, (count, 3, SIDE, width), generator=torch.Generator().manual_seed(0))
    shown = {"red apple": (200, 40, 40), "green pear": (40, 180, 60), "blue plum, ripe": (50, 50, 220)}
    captions = tuple("blue plum, ripe" if i % 10 == 0 else ("red apple", "green pear")[i % 2] for i in range(count))
    images = torch.tensor([shown[caption] for caption in captions])[..., None, None] + noise
    return ImageData(images.clamp(0, 255).byte(), captions=captions)


def test_sketches_are_the_means_of_the_images_that_have_the_words(tmp_path):
    """Of half of a caption as well; an empty one's is the mean of all. (.1: a twentieth of the range of colours.)"""
    data = colours(512)
    train(DEEP, data, tmp_path / "model")
    network = pf.load(tmp_path / "model").denoiser.module
    images = data.images.float() / 127.5 - 1
    texts = ["", "red apple", "blue plum", "ripe"]
    sketches = network.sketcher(tokens(texts, network.config.words)).unflatten(1, (3, -1)).mean(2)
    has = [torch.tensor([text in caption for caption in data.captions]) for text in texts]
    truth = torch.stack([images[which].mean((0, 2, 3)) for which in has])
    assert float((sketches - truth).abs().max()) < 0.1
    assert not any(weight.requires_grad for weight in network.sketcher.parameters())


def test_a_training_that_went_on_has_the_sketches_it_began_with(tmp_path):
    data = colours(40)
    train(replace(DEEP, steps=2), data, tmp_path / "whole")
    train(DEEP, data, tmp_path / "parts")
    train(replace(DEEP, steps=2), data, tmp_path / "parts")
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    sketcher = {name: weight for name, weight in whole.items() if name.startswith("sketcher")}
    assert len(sketcher) == 5
    assert all(torch.equal(parts[name], weight) for name, weight in sketcher.items())


def test_sketches_of_states_with_velocities_and_of_wide_images(tmp_path):
    """Small sketches of whole states are stretched to the images' sides; the velocities' mean is none."""
    train(replace(DEEP, process="blurring-langevin"), colours(256, width=2 * SIDE), tmp_path / "model")
    model = pf.load(tmp_path / "model")
    sketches = model.denoiser.module.sketcher(tokens(["red apple"], ROWS)).unflatten(1, (6, -1)).mean(2)
    assert float((sketches[0] - torch.tensor([0.57, -0.69, -0.69, 0, 0, 0])).abs().max()) < 0.1
    images = model.sample(2, labels=["red apple", "plum"], guidance=2.0, steps=2)
    assert images.shape == (2, 3, SIDE, 2 * SIDE)


# -- words


def reader():
    """A model that reads, of random weights."""
    torch.manual_seed(0)
    config = preset("tiny", field=(SIDE, SIDE), in_channels=1, out_channels=1, words=64)
    return trained_model(Backbone(config).eval().requires_grad_(False), VP(), (1, SIDE, SIDE))


def test_a_model_under_prompts_keeps_them():
    """It is told them once, whoever asks it again; one prompt is every image's."""
    model = reader()
    plan = pf.SOLVERS["ddim"](model.process, pf.grid.power(model.process, 2))
    prompts = ["red apple", "crying face", "red apple"]
    expected = pf.Diffusion(model, plan).given(prompts, 2.0).sample(3)
    under = pf.Diffusion(model.given(prompts, 2.0), plan)
    torch.testing.assert_close(under.sample(3, batch=2), expected, rtol=1e-4, atol=1e-4)  # rounding of other batches
    nothing = pf.Schedule(steps=1)
    found = pf.guide(under, lambda images, _: 0 * images.flatten(1).sum(1), pf.langevin(1e-8), nothing, chains=3)
    torch.testing.assert_close(found.images[-3:].cpu(), expected, rtol=1e-2, atol=1e-2)  # moved by a ten-thousandth
    again = pf.Diffusion(model.given(["green pear"] * 3).given(prompts), plan)
    torch.testing.assert_close(again.given(guidance=2.0).sample(3), expected)
    alike = pf.Diffusion(model, plan).given(["red apple"] * 2).sample(2)
    torch.testing.assert_close(pf.Diffusion(model.given(["red apple"]), plan).sample(2), alike)


def test_words_beyond_the_last_token_are_named():
    """Those of which some token is not in the row, and no others."""
    words = ["".join(random.Random(k).sample("abcdefghijklmnopqrstuvwxyz", 7)) for k in range(15)]
    text, rows = " ".join(words), 2**40  # no two alike
    row = set(tokens([text], rows)[0].tolist())
    lost = [word for word in words if not {*tokens([word], rows)[0].tolist()} <= {*row, 0}]
    assert 2 < len(lost) < 5
    with pytest.warns(UserWarning, match=f"The model reads 96 tokens of the prompt .*, but not: {' '.join(lost)}$"):
        reader().given([text])
    reader().given([" ".join(words[:10])])  # without a word


def test_tokens_do_not_change():
    """A trained table belongs to these numbers: the word, then its triples of letters with its ends marked."""
    assert tokens(["cat"], ROWS)[0, :5].tolist() == [2618, 3149, 937, 2397, 0]
    assert tokens(["a"], ROWS)[0, :2].tolist() == [684, 0]
    assert tokens(["naïve 2"], 64)[0, :8].tolist() == [48, 2, 16, 13, 15, 58, 61, 0]


def test_case_punctuation_order_of_repeats_and_space_are_no_words():
    whole = tokens(["a grinning cat"], ROWS)
    for same in ("A  Grinning, CAT!", "a grinning cat cat a", "(a) 'grinning'\ncat 😀"):
        assert torch.equal(tokens([same], ROWS), whole)
    assert not torch.equal(tokens(["a grinning dog"], ROWS), whole)


def test_an_empty_text_is_nothing_and_an_unknown_word_is_something():
    assert not tokens(["", "...", " \n"], ROWS).any()
    assert tokens(["zxqv"], ROWS).any()
    assert tokens([], ROWS).shape == (0, LENGTH)


def test_words_that_share_letters_share_tokens():
    """`crying` and `cry` have their first three letters in common, and their beginning; `crying` and `dog` nothing."""
    one, like, unlike = ({int(n) for n in row if n} for row in tokens(["crying", "cry", "dog"], 2**30))
    assert len(one & like) == 2
    assert not one & unlike


def test_tokens_lie_within_the_table():
    table = tokens(["the quick brown fox", "jumps", ""], 7)
    assert table.shape == (3, LENGTH)
    assert table.dtype == torch.long
    assert int(table.max()) <= 7
    assert int(table.min()) == 0
    filled = table > 0
    assert bool((filled[:, :-1] | ~filled[:, 1:]).all())  # filling comes last


def test_a_long_text_is_cut():
    words = [f"word{chr(97 + i)}{chr(97 + j)}" for i in range(8) for j in range(8)]
    whole = tokens([" ".join(words)], ROWS)
    assert bool((whole > 0).all())
    assert torch.equal(whole, tokens([" ".join([*words, "more"])], ROWS))
    assert not torch.equal(whole, tokens([" ".join(words[1:])], ROWS))


# -- parts hidden


def test_parts_are_hidden_by_the_toss_of_a_coin():
    """Of 4000 captions half are whole and half tossed for, part by part; bounds of four deviations of a binomial."""
    count, caption = 4000, "a red cat, big,wet"
    parts = caption.split(",")
    generator = torch.Generator().manual_seed(0)
    shown = Counter(hide_parts(caption, generator) for _ in range(count))
    expected = {}
    for kept in range(8):
        text = ",".join(part for k, part in enumerate(parts) if kept >> k & 1)
        expected[text] = (1 / 2 if kept == 7 else 0) + 1 / 16
    assert set(shown) == set(expected)
    for text, share in expected.items():
        assert abs(shown[text] - share * count) < 4 * (share * (1 - share) * count) ** 0.5, text


def test_a_caption_without_parts_is_hidden_at_times_and_an_empty_one_stays():
    """Of one part a quarter: half of the half that is tossed for."""
    generator = torch.Generator().manual_seed(1)
    shown = Counter(hide_parts("a cat", generator) for _ in range(2000))
    assert set(shown) == {"a cat", ""}
    assert abs(shown[""] - 500) < 4 * (2000 * 3 / 16) ** 0.5
    assert hide_parts("", generator) == ""
    one, other = (hide_parts("a,b,c,d,e", torch.Generator().manual_seed(2)) for _ in range(2))
    assert one == other


# -- captions from files


def test_captions_of_an_npz_file(tmp_path):
    x = np.zeros((2, SIDE, SIDE, 3), np.uint8)
    for key in ("captions_train", "captions"):
        np.savez(tmp_path / "d.npz", **{"x_train": x, key: np.array(["a red cat", "ein größerer Hund"])})
        assert load_images(tmp_path / "d.npz").captions == ("a red cat", "ein größerer Hund")
    np.savez(
        tmp_path / "d.npz", x_test=x[:1], captions_test=np.array(["wet"]), x_train=x, captions=np.array(["a", "b"])
    )
    assert load_images(tmp_path / "d.npz", split="test").captions == ("wet",)
    np.savez(tmp_path / "d.npz", x=x, captions=np.array([b"a cat", "größer".encode()]))
    assert load_images(tmp_path / "d.npz").captions == ("a cat", "größer")
    np.savez(tmp_path / "d.npz", x=x)
    assert load_images(tmp_path / "d.npz").captions is None


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        (np.array(["one"]), "has 1 captions for 2 images; give one per image"),
        (np.array(["one", None], dtype=object), "cannot be read as an .npz file"),
    ],
)
def test_captions_that_do_not_fit_are_refused(tmp_path, captions, message):
    np.savez(tmp_path / "d.npz", x=np.zeros((2, SIDE, SIDE), np.uint8), captions=captions)
    with pytest.raises(PushforwardError, match=message) as caught:
        load_images(tmp_path / "d.npz")
    assert "\n" not in str(caught.value)


def folder_of(path, text):
    for name in ("a.png", "b.png", "deep/c.png"):
        save_png(path / name)
    (path / "metadata.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def lines(**captions):
    return "".join(json.dumps({"file_name": name, "text": text}) + "\n" for name, text in captions.items())


ALL = {"b.png": "the b", "a.png": "the a", "deep/c.png": "the c"}


@pytest.mark.parametrize(
    "text",
    [
        lines(**ALL),
        "\n" + lines(**ALL) + "\n\n",
        lines(**ALL).replace("\n", "\r\n"),
        lines(**ALL).replace('"text"', '"caption"'),
        lines(**ALL).replace("a.png", "./a.png"),
        lines(**ALL, **{"other.png": "not there"}) + '{"file_name": "d.png"}\n{"text": "no name"}\n',
    ],
    ids=["plain", "empty lines", "windows", "caption", "dot", "more"],
)
def test_captions_of_a_folder(tmp_path, text):
    """Each image gets its own, whatever their order in the file."""
    assert load_images(folder_of(tmp_path, text)).captions == ("the a", "the b", "the c")


def test_a_caption_may_hold_any_letter(tmp_path):
    """Also those that end a line elsewhere, and are written as they are."""
    odd = "one\u2028two\x85three\nfour"
    entries = [{"file_name": name, "text": odd} for name in ALL]
    text = "\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    assert load_images(folder_of(tmp_path, text)).captions == (odd,) * 3


def test_broken_images_need_no_caption(tmp_path):
    folder_of(tmp_path, lines(**{name: text for name, text in ALL.items() if name != "a.png"}))
    (tmp_path / "a.png").write_bytes(b"no picture")
    data = load_images(tmp_path)
    assert data.captions == ("the b", "the c")
    assert len(data.skipped) == 1


def test_without_the_file_or_texts_in_it_there_are_no_captions(tmp_path):
    assert load_images(folder_of(tmp_path, "")).captions is None
    (tmp_path / "metadata.jsonl").unlink()
    assert load_images(tmp_path).captions is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (lines(**{"a.png": "the a"}), r"has no text for 2 of 3 images, b.png for one; add it, or remove the file"),
        (lines(**ALL) + "nonsense\n", "Line 4 of .*metadata.jsonl is not a JSON object"),
        ("[1, 2]\n", "Line 1 of .* is not a JSON object"),
        ('"a.png"\n', "Line 1 of .* is not a JSON object"),
        ("null\n", "Line 1 of .* is not a JSON object"),
        (lines(**ALL).replace('"the a"', "5"), "has no text for 1 of 3 images, a.png for one"),
        (b'{"file_name": "a.png", "text": "\xff\xfe"}\n', "metadata.jsonl is not UTF-8 text"),
    ],
)
def test_bad_captions_of_a_folder_are_refused_in_a_sentence(tmp_path, text, message):
    with pytest.raises(PushforwardError, match=message) as caught:
        load_images(folder_of(tmp_path, text))
    assert "\n" not in str(caught.value)


# -- training

TRAIN = ["--network", "tiny", "--batch", 4, "--precision", "no", "--sample-every", 0, "--learning-rate", 0.01, "-q"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model trained for three steps on a tiny `.npz` file with captions, by the command line."""
    folder = tmp_path_factory.mktemp("trained")
    data = captioned()
    np.savez(folder / "data.npz", x_train=data.images.permute(0, 2, 3, 1).numpy(), captions=np.array(data.captions))
    result = invoke("train", folder / "model", "--data", folder / "data.npz", "--steps", 3, *TRAIN)
    assert result.exit_code == 0, result.exception
    return folder / "model"


def sampled(model, out, *options):
    """Two images, `(2, height, width, channels)`."""
    each = out.with_suffix("")
    result = invoke("sample", model, "--count", 2, "--steps", 3, "--solver", "ddim", "--out", out, "--each", each, "-q",
                    *options)  # fmt: skip
    assert result.exit_code == 0, result.exception
    return np.stack([pixels(file) for file in sorted(each.glob("*.png"))])


def test_a_model_of_captions_reads(trained):
    model = pf.load(trained)
    assert model.text is not None
    assert model.classes == ()
    assert torch.equal(model.text(["red cat"])[0], tokens(["red cat"], ROWS))
    assert model.module.config.words == ROWS
    card = (trained / "README.md").read_text()
    assert "| captions | such as 'red cat, big' |" in card


def test_prompts_decide_what_is_drawn(trained, tmp_path):
    cat, again, dog = (
        sampled(trained, tmp_path / "x.png", "--prompt", text) for text in ("red cat", "Red CAT.", "dog")
    )
    assert np.array_equal(cat, again)
    assert not np.array_equal(cat, dog)
    turns = sampled(trained, tmp_path / "x.png", "--prompt", "red cat", "--prompt", "dog")
    assert np.array_equal(turns[0], cat[0])
    assert np.array_equal(turns[1], dog[1])


def test_without_a_prompt_some_of_the_trainings_captions_are_drawn(trained, tmp_path):
    known = pf.load(trained).info["captions"]
    assert set(known) == set(CAPTIONS)
    told = sampled(trained, tmp_path / "x.png", "--prompt", known[0], "--prompt", known[1])
    assert np.array_equal(sampled(trained, tmp_path / "x.png"), told)


def test_the_negative_prompt_counts_with_guidance_alone(trained, tmp_path):
    """With a guidance of 0 it is all that counts."""
    out, cat = tmp_path / "x.png", ["--prompt", "red cat"]
    plain = sampled(trained, out, *cat)
    refused(invoke("sample", trained, "--out", out, *cat, "--negative", "dog"), "guidance is 1")
    guided = sampled(trained, out, *cat, "--guidance", 8)
    away = sampled(trained, out, *cat, "--guidance", 8, "--negative", "blue dog")
    assert not np.array_equal(guided, plain)
    assert not np.array_equal(guided, away)
    none = sampled(trained, out, *cat, "--guidance", 0, "--negative", "dog")
    assert np.array_equal(none, sampled(trained, out, "--prompt", "dog"))


def test_prompts_of_a_batch_are_those_of_each_image(trained):
    """Float32 rounding of convolutions; also with all steps at once, and with guidance away from another prompt."""
    model = pf.load(trained)
    sampler = pf.Diffusion(model, pf.SOLVERS["ddim"](model.process, pf.grid.uniform(model.process, 4)))
    prompts = ["red cat", "dog", "red cat", "", "blue"]
    for guidance in (1.0, 3.0):
        whole = sampler.given(prompts, guidance).sample(5)
        for batch in (1, 2):
            part = sampler.given(prompts, guidance).sample(5, batch=batch)
            torch.testing.assert_close(part, whole, rtol=0, atol=1e-4)
        for i in (1, 3):
            alone = sampler.given(prompts[i : i + 1], guidance).sample(1, first=i)
            torch.testing.assert_close(alone, whole[i : i + 1], rtol=0, atol=1e-4)
        at_once = sampler.given(prompts, guidance).run_by(parallel=pf.Parallel(tolerance=1e-5)).sample(5)
        torch.testing.assert_close(at_once, whole, rtol=0, atol=1e-3)
    assert torch.equal(sampler.given(["", ""]).sample(2), sampler.given(None).sample(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--label", "red"], "has no classes; give a --prompt instead"),
        (["--label", "red", "--prompt", "red"], "Give labels or prompts, not both"),
        (["--prompt", "red", "--eta", 2, "--solver", "ddim"], "eta must lie in [0, 1]"),
    ],
)
def test_what_a_model_of_captions_does_not_take(trained, tmp_path, options, message):
    refused(invoke("sample", trained, "--count", 1, "--steps", 2, "--out", tmp_path / "x.png", "-q", *options), message)
    assert not list(tmp_path.iterdir())


def test_labels_from_python_are_refused(trained):
    model = pf.load(trained)
    with pytest.raises(PushforwardError, match="give prompts, not labels"):
        model.given(torch.tensor([0]))
    assert model.given("red cat").conditions == 1  # every image's
    with pytest.raises(PushforwardError, match="give prompts, not labels"):
        model.given(3)
    with pytest.raises(PushforwardError, match="Guidance 2 has no effect on model 'model' without a prompt"):
        model.given(None, 2.0)


class Stopped(Exception):
    """What stops a training."""


def test_an_interrupted_training_gives_the_same_weights(trained, tmp_path):
    """Captions, what is hidden of them, and all else are functions of the seed and the step: not a bit differs."""
    config = TrainConfig(steps=8, save_every=3, log_every=1, **TINY)

    def stop(step, *_):
        if step == 5:
            raise Stopped

    train(config, captioned(), tmp_path / "whole")
    with pytest.raises(Stopped):
        train(config, captioned(), tmp_path / "parts", callback=stop)
    assert pf.load(tmp_path / "parts").text is not None
    report = train(config, captioned(), tmp_path / "parts")
    assert (report.resumed_from, report.steps) == (3, 8)
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    other = replace(config, label_dropout=0.5)
    train(other, captioned(), tmp_path / "other")
    other = load_file(tmp_path / "other" / "model.safetensors")
    assert not torch.equal(whole["reader.table.weight"], other["reader.table.weight"])


def test_training_on_captions_learns_them(tmp_path):
    """Images of one grey level each, bright or dark as their caption says, and a word of no meaning."""
    level = torch.arange(32) % 2
    images = (70 + 120 * level).byte().view(-1, 1, 1, 1).expand(-1, 1, SIDE, SIDE).contiguous()
    captions = tuple(f"{'bright' if k else 'dark'}, thing{i % 3}" for i, k in enumerate(level.tolist()))
    settings = {**TINY, "batch": 16, "learning_rate": 1e-2}
    train(TrainConfig(steps=100, **settings), ImageData(images, captions=captions), tmp_path)
    model = pf.load(tmp_path)
    t = torch.tensor([0.9], dtype=torch.float64)
    state = torch.randn(64, 1, SIDE, SIDE)
    found = {}
    for text in ("dark", "bright", "bright, thing1", "thing1", ""):
        told = model.given([text] * 64).denoiser
        found[text] = float(told.at(model.process, t, state)(0, state).mean())
    assert found["dark"] < found["bright"] - 0.3
    assert found["bright, thing1"] > found["dark"] + 0.3
    assert found["dark"] < found[""] < found["bright"]
    assert found["dark"] < found["thing1"] < found["bright"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_network_of_16_bits_reads_as_one_of_32(dtype):
    """To the rounding of 8 bits, in some ten layers."""
    u = torch.randn(2, 3, 32, 32)
    t = torch.tensor(0.9, dtype=torch.float64)
    answers = []
    for kind in (torch.float32, dtype):
        model = pf.load("emoji", dtype=kind).given(["apple, noto", ""])
        answers.append(model.denoiser.at(model.process, t[None], u)(0, u))
    assert (answers[1] - answers[0]).norm() < 0.05 * answers[0].norm()


def test_captions_go_before_classes(tmp_path):
    """A folder may have both; the model reads, has no classes, and can be read again."""
    data = captioned(labels=torch.arange(8) % 2)
    train(TrainConfig(steps=1, **TINY), data, tmp_path)
    model = pf.load(tmp_path)
    assert model.text is not None
    assert (model.classes, model.means) == ((), None)
    assert model.given(["red cat"]).gaussian.mean.shape == (3, SIDE, SIDE)


def test_a_training_does_not_go_on_without_its_captions(trained, tmp_path):
    """Nor with classes in their place: the network is another one."""
    folder = shutil.copytree(trained, tmp_path / "model")
    data = captioned()
    np.savez(tmp_path / "plain.npz", x_train=data.images.permute(0, 2, 3, 1).numpy())
    result = invoke("train", folder, "--data", tmp_path / "plain.npz", "--steps", 5, *TRAIN)
    refused(result, "other settings (classes or captions differ)")


def test_a_folder_with_captions_is_trained_by_the_command(tmp_path):
    folder_of(tmp_path / "images", lines(**ALL))
    result = invoke("train", tmp_path / "m", "--data", tmp_path / "images", "--steps", 1, *TRAIN)
    assert result.exit_code == 0, result.exception
    assert pf.load(tmp_path / "m").text is not None
