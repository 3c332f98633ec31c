"""Data sets as users have them: splits, captions and classes of folders, and arrays; `datasets` reads some as well."""

import csv
import gc
import json
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pushforward.data.datasets import load_images
from pushforward.errors import PushforwardError

SIDE = 4


def picture(path: Path, value: int) -> Path:
    """A grey picture whose level tells which it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((SIDE, SIDE), value, np.uint8)).save(path)
    return path


def pictures(folder: Path, *names: str) -> dict[str, int]:
    values = {name: 10 * (k + 1) for k, name in enumerate(names)}
    for name, value in values.items():
        picture(folder / name, value)
    return values


def found(folder: Path, **settings) -> tuple[dict[int, str | None], dict[int, str], str]:
    """By the level of the picture: captions and class names; and the notes, joined."""
    data = load_images(folder, **settings)
    levels = [int(image[0, 0, 0]) for image in data.images]
    captions = dict(zip(levels, data.captions or [None] * len(levels), strict=True))
    labels = {} if data.labels is None else {n: data.classes[k] for n, k in zip(levels, data.labels, strict=True)}
    return captions, labels, "\n".join(data.notes)


def as_datasets(folder: Path, tmp_path: Path, split: str = "train") -> dict[int, dict]:
    """What `imagefolder` of `datasets` reads there, by the level of the picture."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves CSV files open
        data = datasets.load_dataset("imagefolder", data_dir=str(folder), split=split, cache_dir=str(tmp_path / "c"))
        gc.collect()
    label = data.features.get("label")
    rows = {int(np.asarray(row["image"])[0, 0]): {k: v for k, v in row.items() if k != "image"} for row in data}
    if isinstance(label, datasets.ClassLabel):
        rows = {level: {**row, "label": label.int2str(row["label"])} for level, row in rows.items()}
    return rows


# -- captions


def write_metadata(folder: Path, kind: str, rows: list[dict]) -> None:
    match kind:
        case "jsonl":
            (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        case "csv":
            with (folder / "metadata.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0].keys())
                writer.writeheader()
                writer.writerows(rows)
        case "parquet":
            pyarrow = pytest.importorskip("pyarrow")
            from pyarrow import parquet

            parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "metadata.parquet")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("column", ["text", "prompt", "image_caption", "additional_feature"])
def test_captions_of_metadata_are_those_of_datasets(tmp_path, kind, column):
    """Beside the images, and above them; a column of any usual name, or the one that has sentences."""
    folder = tmp_path / "in"
    names = pictures(folder, "a.png", "deep/b.png", "deep/c, d.png")
    rows = [{"file_name": name, "licence": "CC0", column: f'what "{name}" shows, ü'} for name in reversed(names)]
    write_metadata(folder, kind, rows)
    captions, _, said = found(folder)
    assert captions == {level: f'what "{name}" shows, ü' for name, level in names.items()}
    assert f"metadata.{kind}: captions from its column {column}; not read: licence" in said
    assert captions == {level: row[column] for level, row in as_datasets(folder, tmp_path).items()}


def test_the_first_of_several_captions_and_of_several_columns(tmp_path):
    names = pictures(tmp_path, "a.png", "b.png")
    rows = [{"file_name": name, "prompt": "no", "captions": [f"{name} one", f"{name} two"]} for name in names]
    write_metadata(tmp_path, "jsonl", [*rows, {**rows[0], "captions": ["again"]}])
    captions, _, said = found(tmp_path)
    assert captions == {10: "a.png one", 20: "b.png one"}
    assert "not read: prompt; 1 more row of the same images not read" in said


def test_metadata_in_the_folders_of_the_images(tmp_path):
    folder = tmp_path / "in"
    pictures(folder, "one/a.png", "two/a.png")
    for name in ("one", "two"):
        write_metadata(folder / name, "jsonl", [{"file_name": "a.png", "text": f"of {name}"}])
    assert found(folder)[0] == {10: "of one", 20: "of two"}
    assert {k: row["text"] for k, row in as_datasets(folder, tmp_path).items()} == {10: "of one", 20: "of two"}


def test_labels_of_metadata(tmp_path):
    pictures(tmp_path, "a.png", "b.png", "c.png")
    for labels in (["cat", "dog", "cat"], [2, 0, 2]):
        rows = [{"file_name": f"{name}.png", "label": label} for name, label in zip("abc", labels, strict=True)]
        for kind in ("jsonl", "csv"):
            (tmp_path / "metadata.jsonl").unlink(missing_ok=True)
            write_metadata(tmp_path, kind, rows)
            captions, classes, said = found(tmp_path)
            assert classes == {10 * (k + 1): str(label) for k, label in enumerate(labels)}
            assert set(captions.values()) == {None}
            assert f"metadata.{kind}: classes from its column label" in said


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("metadata.jsonl", b'{"image": "a.png", "text": "x"}\n', "metadata.jsonl has no column file_name"),
        ("metadata.csv", b"file_name,width\na.png,3\n", "no column of captions or classes; not read: width"),
        ("notes.csv", b"a,b\n", "not read: 1 .csv file"),
        ("b.heic", b"?", "not read: 1 .heic file"),
        (".hidden.png", b"?", "not read: 1 hidden image"),
        ("__MACOSX/._a.png", b"?", "not read: 1 hidden image"),
    ],
)
def test_what_is_not_read_is_said(tmp_path, name, content, said):
    pictures(tmp_path, "a.png")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    captions, labels, notes = found(tmp_path)
    assert (captions, labels) == ({10: None}, {})
    assert said in notes


def test_damaged_metadata_is_one_sentence(tmp_path):
    pictures(tmp_path, "a.png")
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(PushforwardError, match="cannot be read as Parquet") as error:
        load_images(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("ends", [".txt", ".caption", ".png.txt"])
def test_captions_in_text_files_beside_the_images(tmp_path, ends):
    names = pictures(tmp_path, "a.png", "cat/b.v2.png", "dog/c.png")
    for name in list(names)[:2]:
        file = tmp_path / name
        (file.with_name(file.name + ".txt") if ends == ".png.txt" else file.with_suffix(ends)).write_bytes(
            f"\ufeffa cat,\tü {name}\r\n\r\non a mat \n".encode()
        )
    captions, labels, said = found(tmp_path)
    assert captions == {10: "a cat,\tü a.png, on a mat", 20: "a cat,\tü cat/b.v2.png, on a mat", 30: ""}
    assert labels == {}  # a picture beside the folders is not lost, where captions are learnt
    assert f"captions from 2 {ends[-4:] if ends.endswith('.txt') else ends} files; 1 image without" in said


def test_a_few_text_files_are_no_captions_and_this_is_said(tmp_path):
    pictures(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "a.txt").write_text("remember the milk")
    captions, _, said = found(tmp_path)
    assert set(captions.values()) == {None}
    assert "no captions, as 2 of 3 images have no .txt file beside them" in said
    assert "not read: 1 .txt file" in said


def test_metadata_go_before_text_files_which_are_said_to_be_left(tmp_path):
    pictures(tmp_path, "a.png")
    (tmp_path / "a.txt").write_text("no")
    write_metadata(tmp_path, "jsonl", [{"file_name": "a.png", "text": "yes"}])
    captions, _, said = found(tmp_path)
    assert captions == {10: "yes"}
    assert "not read: 1 .txt file" in said


# -- classes


@pytest.mark.parametrize(
    "names",
    [
        ("cat/1.png", "dog/2.png", "cat/3.png"),
        ("data/images/cat/1.png", "data/images/dog/2.png"),
        ("animals/cat/1.png", "animals/dog/2.png", "cars/van/3.png"),
        ("images/1.png", "images/2.png"),
        ("1.png", "2.png"),
    ],
)
def test_classes_are_those_of_datasets(tmp_path, names):
    pictures(tmp_path / "in", *names)
    theirs = {level: row["label"] for level, row in as_datasets(tmp_path / "in", tmp_path).items() if "label" in row}
    assert found(tmp_path / "in")[1] == theirs


def test_folders_of_other_depths_and_of_equal_names_are_classes_by_the_top(tmp_path):
    pictures(tmp_path / "a", "cat/1.png", "cat/deep/2.png", "dog/3.png")
    assert found(tmp_path / "a")[1] == {10: "cat", 20: "cat", 30: "dog"}
    pictures(tmp_path / "b", "cat/indoors/1.png", "dog/indoors/2.png", "dog/outside/3.png")
    assert found(tmp_path / "b")[1] == {10: "cat", 20: "dog", 30: "dog"}


def test_a_stray_image_costs_itself_and_not_the_classes(tmp_path):
    pictures(tmp_path, "cat/1.png", "dog/2.png", "stray.png")
    captions, labels, said = found(tmp_path)
    assert labels == {10: "cat", 20: "dog"}
    assert set(captions) == {10, 20}
    assert "1 image left out, in no class's folder" in said
    assert "stray.png" in said


@pytest.mark.parametrize("names", [("1.png", "2.png", "a/3.png", "b/4.png"), ("1.png", "2.png", "more/3.png")])
def test_where_most_lie_beside_the_folders_all_are_read_without_classes(tmp_path, names):
    pictures(tmp_path, *names)
    captions, labels, said = found(tmp_path)
    assert len(captions) == len(names)
    assert labels == {}
    assert "no classes, because " in said


def test_folders_behind_links_are_read_once(tmp_path):
    pictures(tmp_path / "elsewhere", "1.png")
    pictures(tmp_path / "in", "dog/2.png", "dog/3.png")
    (tmp_path / "in" / "cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "dog" / "round").symlink_to(tmp_path / "in")
    assert len(load_images(tmp_path / "in")) == 3
    assert load_images(tmp_path / "in").classes == ("cat", "dog")


# -- splits


@pytest.mark.parametrize("top", ["", "data/"])
def test_splits_are_those_of_datasets(tmp_path, top):
    names = ("train/cat/1.png", "train/dog/2.png", "val/cat/3.png", "test/dog/4.png", "test/cat/5.png")
    folder = tmp_path / "in"
    pictures(folder, *(top + name for name in names))
    for split, levels in (("train", {10: "cat", 20: "dog"}), ("test", {40: "dog", 50: "cat"})):
        _, labels, said = found(folder, split=split)
        theirs = {level: row["label"] for level, row in as_datasets(folder, tmp_path, split).items()}
        assert labels == levels == theirs
        assert f"the split {split} of test, train, validation: 2 images" in said
    assert list(found(folder, split="validation")[0]) == [30]


def test_an_absent_split_and_an_unknown_one_are_one_sentence(tmp_path):
    pictures(tmp_path, "train/1.png", "stray.png")
    with pytest.raises(PushforwardError, match="no images of the split test, only of train; name one of its folders"):
        load_images(tmp_path, split="test")
    with pytest.raises(PushforwardError, match="has the splits train, validation, test; got 'banana'"):
        load_images(tmp_path, split="banana")
    assert "1 image in no split, left out (stray.png)" in found(tmp_path)[2]


# -- arrays


def arrays(path: Path, **named) -> Path:
    np.savez(path, **named)
    return path


X = np.arange(3 * SIDE * SIDE * 3, dtype=np.uint8).reshape(3, SIDE, SIDE, 3)


def test_samples_as_guided_diffusion_writes_them(tmp_path):
    """`np.savez(path, images, labels)`: the names are `arr_0` and `arr_1`, whatever the split."""
    np.savez(tmp_path / "samples.npz", X, np.array([2, 0, 2]))
    for split in ("train", "test"):
        data = load_images(tmp_path / "samples.npz", split=split)
        assert (data.images.permute(0, 2, 3, 1).numpy() == X).all()
        assert data.labels is not None
        assert data.labels.tolist() == [2, 0, 2]
        assert data.notes == ("images from arr_0, labels from arr_1",)


@pytest.mark.parametrize(
    ("labels", "numbers", "classes"),
    [
        (np.array([[2], [0], [2]]), [2, 0, 2], ("0", "1", "2")),
        (np.array([[2.0], [0.0], [2.0]]), [2, 0, 2], ("0", "1", "2")),
        (np.eye(3)[[2, 0, 2]], [2, 0, 2], ("0", "1", "2")),
        (np.array(["dog", "cat", "dog"]), [1, 0, 1], ("cat", "dog")),
        (np.array([[b"dog"], [b"cat"], [b"dog"]]), [1, 0, 1], ("cat", "dog")),
    ],
    ids=["column", "floating point", "one-hot", "names", "column of bytes"],
)
def test_labels_of_any_usual_shape(tmp_path, labels, numbers, classes):
    data = load_images(arrays(tmp_path / "d.npz", x=X, y=labels))
    assert data.labels is not None
    assert (data.labels.tolist(), data.classes) == (numbers, classes)


@pytest.mark.parametrize("names", [10, ["a", "b", "c"], [["a"], ["b"], ["c"]]], ids=["count", "names", "column"])
def test_names_of_classes_of_any_shape(tmp_path, names):
    """Their count, as some files have it, names none of them."""
    data = load_images(arrays(tmp_path / "d.npz", x=X, y=np.arange(len(X)) % 3, classes=names))
    assert data.classes == (("0", "1", "2") if names == 10 else ("a", "b", "c"))


def test_the_arrays_of_medmnist_by_split_and_what_is_left(tmp_path):
    path = arrays(
        tmp_path / "d.npz", train_images=X, train_labels=np.array([[0], [1], [1]]), val_images=X[:1],
        val_labels=np.array([[1]]), test_images=X[:2], test_labels=np.array([[1], [0]]), extra=np.zeros(3),
    )  # fmt: skip
    for split, labels in (("train", [0, 1, 1]), ("val", [1]), ("test", [1, 0])):
        data = load_images(path, split=split)
        assert data.labels is not None
        assert data.labels.tolist() == labels
        assert data.notes[1] == "not read: array extra"


@pytest.mark.parametrize(
    "labels",
    [np.array([0, 1, 2**62]), np.array([0, -1, 1]), np.array([0.5, 1, 2]), np.array([0, np.nan, 1]), np.eye(2)],
)
def test_labels_that_cannot_be_are_one_sentence(tmp_path, labels):
    with pytest.raises(PushforwardError, match=r"labels of .* (must be|go up to)") as error:
        load_images(arrays(tmp_path / "d.npz", x=X, y=labels))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["another member", "flipped bits"])
def test_a_damaged_file_of_arrays_is_one_sentence(tmp_path, damage):
    path = tmp_path / "d.npz"
    if damage == "another member":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("x_train.npy", b"no array")
    else:
        np.savez_compressed(path, x_train=X)
        data = bytearray(path.read_bytes())
        data[60:120] = bytes(255 - value for value in data[60:120])
        path.write_bytes(data)
    with pytest.raises(PushforwardError, match=r"d\.npz cannot be read as an \.npz file: ") as error:
        load_images(path)
    assert "\n" not in str(error.value)


def test_what_is_done_to_the_images_is_among_the_notes(tmp_path):
    path = arrays(tmp_path / "d.npz", x=X)
    assert load_images(path, size=(2, 4), fit="stretch").notes[1] == "3 images stretched from 4x4 to 4x2"
    picture(tmp_path / "in" / "a.png", 3)
    assert load_images(tmp_path / "in", size=8, channels=3).notes == (
        "1 image made colour from grey", "1 image resized from 4x4 to 8x8",
    )  # fmt: skip


def test_a_hub_without_an_answer_is_asked_once(tmp_path, monkeypatch):
    """`datasets` asks it for half a minute; what is on this machine already is read without it."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    asked = []

    def read(name, **_):
        asked.append(name)
        raise ValueError("read from the cache")

    monkeypatch.setattr(datasets, "load_dataset", read)
    with pytest.raises(PushforwardError, match="cannot be loaded as a data set: the hub gives no answer"):
        load_images("someone/pictures")
    assert not asked
    (tmp_path / "someone___pictures").mkdir()
    with pytest.raises(PushforwardError, match="read from the cache"):
        load_images("someone/pictures")
