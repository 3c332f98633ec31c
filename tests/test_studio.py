"""The page's tabs as functions: what they show, and that their commands and programs give the same."""

import io
import json
import re
import shlex
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load as load_tensors

from pushforward.data.pictures import to_bytes
from pushforward.errors import PushforwardError
from pushforward.guidance.dynamics import SAMPLERS
from pushforward.maps.storage import decoder_of, load_codes
from pushforward.model.zoo import names
from pushforward.plan import save_plan
from pushforward.studio import compare, edit, guide, inpaint, invert, page, plan, sample
from pushforward.studio._shared.live import Stopped, live
from pushforward.studio._shared.masks import PARTS, canvas, mask_file, mask_of
from pushforward.studio._shared.models import EMBEDDED, Shelf, choices_of, steps_beside
from pushforward.studio._shared.results import call, line, packed
from pushforward.studio._shared.told import sentence
from pushforward.studio._shared.uploads import PIXELS, photo_of, read_photo
from pushforward.translation.translate import TRANSLATIONS
from pushforward.verbs import from_pipeline, load
from support.cli import invoke

NAME = "fashion-vp"


@pytest.fixture(scope="module")
def model():
    return load(NAME)


@pytest.fixture(scope="module")
def photos(model):
    images = model.sample(2, labels=["sneaker", "bag"], solver="dpm++", steps=5)
    return [photo_of(one) for one in to_bytes(images)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder that commands run in, as one in which a result was unpacked."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def last(shown):
    *_, end = shown
    return end


def pixels(file):
    return np.asarray(Image.open(io.BytesIO(file) if isinstance(file, bytes) else file))


def commanded(*arguments):
    result = invoke(*arguments)
    assert result.exit_code == 0, result.exception or result.output


def made(*arguments):
    """What a command makes, each image on its own, `(count, channels, height, width)`."""
    commanded(*arguments, "--each", "each", "--quiet")
    return torch.stack([bytes_of(file) for file in sorted(Path("each").glob("*.png"))])


def bytes_of(file):
    return torch.from_numpy(np.atleast_3d(pixels(file)).copy()).movedim(-1, 0)


def furthest(images, others):
    """The largest difference of a pixel, of 255."""
    return int((images.int() - others.int()).abs().max())


def same_picture(name, files, path=None):
    """That a command has written the page's picture, with its words."""
    assert np.array_equal(pixels(files[name]), pixels(path or name)), name


def unpack(files):
    for name, data in files.items():
        Path(name).write_bytes(data)


def ran(program):
    """The names that a program leaves."""
    names = {}
    exec(program, names)
    return names


# -- sample ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        sample.Settings(NAME, 3, "gddim:order=2", 4, ("bag", "ankle boot"), guidance=2.0, seed=1),
        sample.Settings(NAME, 2, "ddim", 6, parallel=True, tolerance=0.01),
        sample.Settings(NAME, 2, "ddpm:steps=3", seed=2),
    ],
    ids=["labels", "parallel", "stochastic"],
)
def test_samples_are_those_of_the_command_and_of_the_program(model, folder, settings):
    found = last(sample.run(model, settings))
    assert torch.equal(made(*sample.command(settings)), to_bytes(found.images))
    assert torch.equal(ran(sample.program(settings))["images"], found.images)
    same_picture("samples.png", found.files)
    unpack(found.files)
    again = made("decode", "codes.safetensors", "--out", "again.png")
    assert furthest(again, to_bytes(found.images)) <= (20 if settings.parallel else 1)


def test_pictures_come_as_they_form(model):
    shown = list(sample.run(model, sample.Settings(NAME, 1, "ddim", 5)))
    assert shown[0].picture is None
    assert any(one.picture is not None and one.images is None for one in shown)
    assert shown[-1].images is not None
    assert "5 network evaluations each" in shown[-1].says


def test_all_steps_at_once_are_a_table_of_rounds_and_states(model):
    end = last(sample.run(model, sample.Settings(NAME, 1, "ddim", 6, parallel=True)))
    rounds = end.rounds.count("<img")
    assert 0 < rounds <= 6
    assert end.rounds.count("<tr>") == rounds + 1
    assert f"in {rounds} rounds, error estimated at " in end.says


def test_adaptive_steps_leave_no_codes(model):
    assert set(last(sample.run(model, sample.Settings(NAME, 1, "rk45:tolerance=0.1"))).files) == {"samples.png"}


def test_steps_are_said_once_and_are_limited():
    assert steps_beside("ddim", 7) == 7
    assert steps_beside("rk45:tolerance=0.1", 7) is None
    assert steps_beside("ddim:steps=9", 7) is None
    with pytest.raises(PushforwardError, match="at most 1000 steps"):
        steps_beside("ddim:steps=100000", 7)


def test_no_plan_of_the_server_is_read(model, tmp_path):
    """Visitors could ask whether a file was there, and draw with it."""
    save_plan(model.plan("ddim", 3), tmp_path / "own.plan")
    for solver in (str(tmp_path / "own.plan"), str(tmp_path / "none.plan"), str(tmp_path / "own.PLAN:steps=3")):
        for run in (
            lambda solver: sample.run(model, sample.Settings(NAME, solver=solver)),
            lambda solver: compare.run(model, compare.Settings(NAME, (solver,))),
            lambda solver: plan.run(model, plan.Settings(NAME, solver)),
        ):
            with pytest.raises(PushforwardError, match="reads no plans from files"):
                list(run(solver))


# -- compare -----------------------------------------------------------------------------------------------------------


def test_solvers_are_compared_with_the_converged_images(model, folder):
    settings = compare.Settings(NAME, ("ddim", "heun", "ddpm"), (4, 9), count=2)
    end = last(compare.run(model, settings))
    converged, *rows = end.entries
    assert [one.settings.solver for one in rows] == ["ddim", "ddim", "heun", "heun", "ddpm", "ddpm"]
    assert [one.drawn.rounds <= calls for one, calls in zip(rows, (4, 9) * 3, strict=True)] == [True] * 6
    assert rows[0].error > rows[1].error > 0
    assert rows[4].error is rows[5].error is None
    assert converged.drawn.nfe == 100
    samplers = compare.samplers(model, settings)
    lines = compare.command(samplers).splitlines()
    for one, words in zip(end.entries, lines, strict=True):
        assert torch.equal(made(*shlex.split(words)[1:]), to_bytes(one.drawn.images))
        assert words.replace("'", "&#x27;") in end.table
    for name in end.files:
        same_picture(name, end.files)  # one for each row; all wrote to one
    for one, images in zip(end.entries, ran(compare.program(samplers))["images"], strict=True):
        assert torch.equal(one.drawn.images, images)


def test_a_comparison_has_rows_and_not_too_many(model):
    for solvers in ((), ("ddim",) * 30):
        with pytest.raises(PushforwardError, match="at least one row, and at most"):
            next(compare.run(model, compare.Settings(NAME, solvers)))


# -- edit --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["stochastic", "uni-inv", "flowalign", "sdedit"])
def test_edits_are_those_of_the_command_and_of_the_program(model, photos, folder, method):
    settings = edit.Settings(NAME, "sneaker", "ankle boot", methods=(method,), steps=6, start=0.5, seed=3)
    end = last(edit.run(model, None, photos[0], settings))
    unpack(end.files)
    commanded(*edit.command(settings, method), "--quiet")
    assert np.array_equal(pixels(end.files[f"{method}.png"]), pixels(f"{method}/picture-0/best.png"))
    again = ran(edit.program(settings, method, photos[0]))["edited"]
    assert torch.equal(again, end.images[method])


def test_translations_are_those_of_the_command_and_of_the_program(folder):
    one, other = load("emoji-noto"), load("emoji-twemoji")
    photo = photo_of(to_bytes(one.sample(1, solver="dpm++", steps=4))[0])
    settings = edit.Settings("emoji-noto", to="emoji-twemoji", methods=("stochastic",), steps=5, guidance=1.0)
    end = last(edit.run(one, other, photo, settings))
    unpack(end.files)
    commanded(*edit.command(settings, "stochastic"), "--quiet")
    assert np.array_equal(pixels(end.files["stochastic.png"]), pixels("stochastic/images/picture-0.png"))
    assert torch.equal(ran(edit.program(settings, "stochastic", photo))["edited"], end.images["stochastic"])


def test_a_method_that_fails_is_told_beside_those_that_do_not_and_once_where_all_do(model, photos, monkeypatch):
    settings = edit.Settings(NAME, "sneaker", "no such thing", methods=edit.METHODS, steps=4)
    with pytest.raises(PushforwardError, match="no class"):
        last(edit.run(model, None, photos[0], settings))

    def changed(*arguments, works=edit._changed):
        if "direct" in arguments:
            raise PushforwardError("It finds no codes.")
        return works(*arguments)

    monkeypatch.setattr(edit, "_changed", changed)
    settings = edit.Settings(NAME, "sneaker", "bag", methods=("sdedit", "direct"), steps=4)
    end = last(edit.run(model, None, photos[0], settings))
    assert set(end.images) == {"sdedit"}
    assert "It finds no codes." in end.row


def test_an_edit_needs_to_be_told_what_to_edit(model, photos):
    for settings in (edit.Settings(NAME), edit.Settings(NAME, "sneaker", "bag", methods=())):
        with pytest.raises(PushforwardError, match=r"Say what|at least one method"):
            next(edit.run(model, None, photos[0], settings))


# -- invert ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["exact", "direct"])
def test_codes_are_those_of_the_command(model, photos, folder, method):
    settings = invert.Settings(NAME, steps=12, method=method, what="sneaker")
    end = last(invert.run(model, photos, settings))
    unpack(end.files)
    ours = load_tensors(end.files["codes.safetensors"])
    found, walk = invert.commands(settings, 2)
    commanded(*found, "--quiet")
    theirs = load_tensors(Path("codes.safetensors").read_bytes())
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in ours)
    same_picture("both.png", end.files)
    unpack(end.files)
    commanded(*walk, "--quiet")
    assert len(end.between) == invert.FRAMES
    same_picture("between.png", end.files)
    again = ran(invert.program(settings, 2))
    assert float((again["again"] - again["images"]).abs().max()) < (1e-3 if method == "exact" else 1e-4)
    assert "perfect" in end.figures
    assert end.figures.count("<tr>") == 4


def test_the_codes_of_a_pipeline_are_kept_with_its_own_guidance(tmp_path):
    from support.pipelines import stable_diffusion

    model = from_pipeline(stable_diffusion(tmp_path), prompt="a fox", guidance_scale=3.0, height=8, width=8)
    photo = photo_of(to_bytes(model.sample(1, solver="ddim", steps=2))[0])
    end = last(invert.run(model, [photo], invert.Settings("pipeline", steps=2, method="naive")))
    unpack({str(tmp_path / name): data for name, data in end.files.items()})
    assert end.says.startswith("4 network evaluations each in 2 rounds and 2 calls of decoding, ")
    code, info = load_codes(tmp_path / "codes.safetensors")
    again = decoder_of(info, model).decode(code)  # guidance of 1 would be 0.1 away and more
    assert float((again - end.found.decode()).detach().abs().max()) <= 1e-4


# -- inpaint -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["ddpm", "ddpm:repeats=3"])
def test_inpaintings_are_those_of_the_command_and_of_the_program(model, photos, folder, solver):
    """Also where the solver's words say something else than the page's slider."""
    settings = inpaint.Settings(NAME, "sneaker", solver, steps=4, repeats=2, draws=2, seed=5)
    mask = mask_of(None, "lower half", (28, 28))
    end = last(inpaint.run(model, photos[0], mask, settings))
    assert torch.equal(end.images[:, :, :14], photos[0].values[:, :, :14].expand(2, -1, -1, -1))
    unpack(end.files)
    commanded(*inpaint.command(settings), "--quiet")
    for k in range(2):
        assert np.array_equal(pixels(end.files[f"{k}.png"]), pixels(f"inpainted/images/picture-0-{k}.png"))
    assert torch.equal(ran(inpaint.program(settings, photos[0]))["painted"][0], end.images)


def test_a_mask_is_what_is_painted_over_and_what_is_named(model, photos):
    large = canvas(photos[0].values)["background"]
    layer = np.zeros((large.height, large.width, 4), dtype=np.uint8)
    layer[: large.height // 4, :, 3] = 255
    painted = mask_of({"layers": [layer]}, None, (28, 28))
    assert painted[:7].all()
    assert not painted[7:].any()
    assert torch.equal(
        mask_of({"layers": [layer]}, "lower half", (28, 28)), painted | mask_of(None, PARTS[1], (28, 28))
    )
    assert np.array_equal(pixels(mask_file(painted)) == 255, painted.numpy())
    with pytest.raises(PushforwardError, match="Paint over"):
        next(inpaint.run(model, photos[0], torch.zeros(28, 28, dtype=torch.bool), inpaint.Settings(NAME)))


# -- guide -------------------------------------------------------------------------------------------------------------


def test_guided_images_are_those_of_the_command_and_of_the_program(model, photos, folder):
    settings = guide.Settings(NAME, "#c0c0c0", "bag", like="a part of it", moves=2, chains=2, solver="dpm++:steps=2")
    shown = list(guide.run(model, photos[0], settings))
    end = shown[-1]
    assert any("codes.safetensors" in one.files for one in shown[:-1])  # what is stopped is kept
    assert end.traces.count("<polyline") == 2
    unpack(end.files)
    commanded(*guide.command(settings), "--quiet")
    theirs = torch.stack([bytes_of(file) for file in sorted(Path("guided/samples").glob("*.png"))])
    assert furthest(theirs, to_bytes(end.images)) <= 1
    same_picture("samples.png", end.files, "guided/samples.png")
    assert torch.allclose(ran(guide.program(settings))["found"].images, end.images, atol=1e-4)
    assert furthest(made("decode", "codes.safetensors", "--out", "again.png"), to_bytes(end.images)) <= 1


def test_the_parts_of_a_reference_weigh_as_much_as_all_of_it(model, photos):
    """A part weighed a hundred times as much, and every chain diverged or stood still at the page's own weight."""
    images = torch.stack([photos[1].values[0], -photos[0].values[0]])
    code = model.diffusion("ddim", 2).draw(2, seed=0)

    def energy(like, part):
        words = guide.energies(guide.Settings(NAME, like=like, part=part))
        return guide._wish(model, photos[0], mask_of(None, part, (28, 28)), words)(images, code)

    halves = energy("a part of it", "left half") + energy("a part of it", "right half")
    torch.testing.assert_close(halves, energy("all of it", "middle"))  # float32 sums of 784 squares


def test_only_the_energies_of_the_page_can_be_asked_for(model):
    for words in ("bag:weight=9", "x:model=/etc/passwd", "a=b"):
        for settings in (guide.Settings(NAME, label=words), guide.Settings(NAME, text=words)):
            with pytest.raises(PushforwardError, match="colons"):
                guide.energies(settings)
    with pytest.raises(PushforwardError, match="at least one energy"):
        guide.energies(guide.Settings(NAME))
    everything = guide.Settings(NAME, "#000000", "bag", "a bag", "all of it")
    assert {one.partition(":")[0] for one in guide.energies(everything)} == {"colour", "classifier", "clip", "near"}
    with pytest.raises(PushforwardError, match="reads no files"):
        last(guide.run(model, photo_of(torch.zeros(1, 28, 28, dtype=torch.uint8)),
                       guide.Settings(NAME, colour="#000000:mask=/etc/passwd")))  # fmt: skip


# -- plan --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["gddim:order=2", "heun", "ddpm"])
def test_coefficients_are_those_of_the_command(model, folder, solver):
    settings = plan.Settings(NAME, solver, 4)
    shown = last(plan.run(model, settings))
    commanded(*plan.command(settings))
    nodes = json.loads(Path("plan.json").read_text())["nodes"]
    for one in shown.entries:
        assert one.value == pytest.approx(nodes[one.node]["terms"][f"{one.kind} {one.of}"])
    said = re.findall("<title>(State .*?)</title>", shown.picture)
    assert len(said) == len(shown.entries)
    _, _, listed = shown.picture.partition("<details>")  # for who has no pointer to point with
    assert sorted(said) == sorted(re.findall("State .*?(?=<)", listed))
    assert len(ran(plan.program(settings).partition("\nfor ")[0])["plan"].nodes) == len(nodes)


def test_a_plan_that_is_too_long_to_look_at_is_refused(model):
    with pytest.raises(PushforwardError, match="fewer steps"):
        next(plan.run(model, plan.Settings(NAME, "ddim", 500)))


# -- what they share ---------------------------------------------------------------------------------------------------


def test_work_ends_when_nobody_looks_any_more():
    ended = []

    def work(tell):
        try:
            for k in range(10**6):
                tell(k)
                time.sleep(0.01)
        except Stopped:
            ended.append(True)
            raise
        return -1

    shown = live(work)
    next(shown)
    shown.close()
    for _ in range(200):
        if ended:
            break
        time.sleep(0.01)
    assert ended
    assert list(live(lambda tell: 5)) == [5]  # the next work waits for no one


def test_what_work_raises_arrives():
    def work(tell):
        tell(1)
        raise PushforwardError("It cannot be done.")

    with pytest.raises(PushforwardError, match="cannot be done"):
        list(live(work))


def test_errors_say_nothing_of_the_server():
    assert sentence(PushforwardError("Take fewer.")) == "Take fewer."
    assert "/secret" not in sentence(OSError("no file /secret/place"))
    long = sentence(PushforwardError(f"No {'x' * 10_000}; take y."))
    assert len(long) < 1000  # it covered the page
    assert long.startswith("No x")
    assert long.endswith("; take y.")
    for lack in ("DefaultCPUAllocator: can't allocate memory", "Storage size calculation overflowed with sizes=[1]"):
        assert "memory" in sentence(RuntimeError(lack))


def test_only_the_models_of_a_page_can_be_opened():
    shelf = Shelf((NAME,), "cpu")
    assert shelf.open(NAME) is shelf.open(NAME)
    assert "sneaker" in choices_of(shelf.open(NAME))
    with pytest.raises(PushforwardError, match="This page has no model"):
        shelf.open("emoji")


def test_a_first_model_that_cannot_be_loaded_is_told_by_the_page_alone(monkeypatch):
    """The thread that loads it ahead leaves no traceback in the terminal."""
    pytest.importorskip("gradio")
    monkeypatch.setattr(page, "make_page", lambda _: SimpleNamespace(launch=lambda **_: None))
    before = set(threading.enumerate())
    page.open_page(Shelf(("nowhere",), "cpu"), browser=False)
    for thread in set(threading.enumerate()) - before:
        thread.join()


def test_uploads_that_are_no_pictures_are_told_without_their_path(model, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    with pytest.raises(PushforwardError, match="cannot be read as a picture") as error:
        read_photo(str(bad), model)
    assert str(tmp_path) not in str(error.value)
    with pytest.raises(PushforwardError, match="Give a picture first"):
        read_photo(None, model)


def test_uploads_of_too_many_pixels_are_refused_before_they_are_read(model, tmp_path):
    large = tmp_path / "large.png"
    Image.new("1", (PIXELS // 5000 + 1, 5000)).save(large)
    with pytest.raises(PushforwardError, match="40 million at most"):
        read_photo(str(large), model)


def test_an_upload_is_brought_to_the_models_shape(model, tmp_path):
    Image.new("RGB", (300, 200), "white").save(tmp_path / "a.jpg")
    photo = read_photo(str(tmp_path / "a.jpg"), model)
    assert photo.values.shape == (1, 1, 28, 28)
    assert pixels(photo.file).shape == (28, 28)


def test_programs_have_the_words_that_were_said():
    """A prompt with an emoji was written with escapes that are another language's."""
    for words in ('\N{GRINNING FACE} "grin"', "two\nlines", "a\\b", "d\u00e9j\u00e0 vu"):
        assert eval(call("str", words)) == words


def test_what_is_taken_away_says_how_it_was_made():
    words = line(["sample", NAME, "--label", "ankle boot"])
    archive = zipfile.ZipFile(io.BytesIO(packed({"a.png": b"1"}, "Move 7 of 60", words, "pass")))
    assert set(archive.namelist()) == {"a.png", "settings.txt"}
    text = archive.read("settings.txt").decode()
    assert text.startswith("# Move 7 of 60\n")  # of chains that were stopped, which the command does not stop
    assert "--label 'ankle boot'" in text


def test_what_is_listed_without_torch_is_what_there_is():
    """The page's layout names these, and does not wait for torch."""
    assert edit.METHODS == TRANSLATIONS
    assert list(guide.SAMPLERS) == list(SAMPLERS)
    assert set(EMBEDDED) <= set(names())
