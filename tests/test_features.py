"""The networks of features, what they take, and what is kept on disk."""

import builtins
import re
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from matplotlib import cbook
from torch import Tensor, nn

from pushforward.data.datasets import load_images, read_image
from pushforward.data.files import cache_folder
from pushforward.errors import PushforwardError
from pushforward.vision import features as module
from pushforward.vision.features import (
    FASHION,
    FeatureNet,
    classify,
    feature_net,
    features,
    published_statistics,
    reference_features,
)

DATA = Path("~/.cache/pushforward-data/fashion.npz").expanduser()


class Counted(nn.Module):
    """Means of the channels, and how often it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.calls.append(len(images))
        return images.float().mean((2, 3))


class Scripted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float().mean((2, 3))


class ScriptedInception(nn.Module):
    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        means = x.float().mean((2, 3))
        return means if return_features else means.sum(1, keepdim=True)


class ScriptedImages(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float()


class ScriptedPicky(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float().flatten(1) @ torch.zeros(5, 2)


def counted() -> tuple[FeatureNet, list[int]]:
    net = Counted()
    return FeatureNet("Counted", net, "1"), net.calls


def scripted(net: nn.Module, path: Path) -> FeatureNet:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(net).save(str(path))
    return feature_net(str(path))


def random_images(n: int, *shape: int) -> Tensor:
    return torch.randint(256, (n, *shape), dtype=torch.uint8)


def trousers() -> Tensor:
    """Two legs, as `(1, 1, 28, 28)`."""
    image = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    image[..., 1:27, 9:13] = image[..., 1:27, 15:19] = image[..., 1:8, 9:19] = 200
    return image


def bag() -> Tensor:
    """A full rectangle with a handle over it."""
    image = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    image[..., 11:27, 1:27] = 180
    image[..., 4:11, 8:20] = 150
    image[..., 6:11, 10:18] = 0
    return image


# -- features ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "shape", "d"), [("fashion", (1, 28, 28), 64), ("effnet", (3, 20, 24), 1280)])
def test_the_batch_changes_nothing_but_rounding(name: str, shape: tuple[int, ...], d: int) -> None:
    """1e-4 of the largest feature: some tens of roundings of float32 in layers of differently ordered sums."""
    if name == "effnet":
        pytest.importorskip("efficientnet_lite_pytorch")
    net, images = feature_net(name), random_images(7, *shape)
    whole, pieces = features(net, images), features(net, images, batch=3)
    assert whole.shape == (7, d)
    assert whole.dtype == torch.float32
    assert not whole.requires_grad
    assert (whole - pieces).abs().max() < 1e-4 * whole.abs().max()
    assert (whole[1:] - whole[:1]).abs().amax(1).min() > 1e-2 * whole.abs().max()  # images differ, and so do these


@pytest.mark.parametrize("name", ["fashion", "effnet"])
def test_loading_a_network_draws_no_random_numbers(name: str) -> None:
    if name == "effnet":
        pytest.importorskip("efficientnet_lite_pytorch")
    before = torch.random.get_rng_state()
    feature_net(name)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_network_left_in_training_is_evaluated() -> None:
    """Batch normalisation in training would make an image's features depend on the others."""
    net = FeatureNet("Norm", nn.Sequential(Scripted(), nn.BatchNorm1d(3)).train(), "1")
    images = random_images(4, 3, 4, 4)
    assert torch.equal(features(net, images)[:2], features(net, images[:2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_other_than_bytes_are_refused(dtype: torch.dtype) -> None:
    net, calls = counted()
    with pytest.raises(PushforwardError, match=re.escape(f"uint8 images; got {dtype}: turn values in [-1, 1] into")):
        features(net, torch.zeros(2, 3, 4, 4, dtype=dtype))
    assert calls == []


def test_what_the_message_says_turns_floats_into_bytes() -> None:
    net, _ = counted()
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).view(1, 1, 5, 1)
    with pytest.raises(PushforwardError) as error:
        features(net, x)
    found = eval(str(error.value).partition("into ")[2].removesuffix("."), {"x": x})
    assert found.flatten().tolist() == [0, 0, 128, 255, 255]
    assert found.dtype == torch.uint8


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 2, 4, 4), (3, 4, 4), (2, 3, 0, 4)])
def test_wrong_shapes_are_refused(shape: tuple[int, ...]) -> None:
    net, _ = counted()
    with pytest.raises(PushforwardError, match=re.escape(f"got shape {shape}")):
        features(net, torch.zeros(shape, dtype=torch.uint8))


def test_an_empty_batch_is_refused() -> None:
    net, _ = counted()
    with pytest.raises(PushforwardError, match="at least 1 image; got 0"):
        features(net, random_images(1, 3, 4, 4), batch=0)


# -- features kept on disk --------------------------------------------------------------------------------------------


def test_kept_features_are_the_same_bits_without_a_call(tmp_path: Path) -> None:
    net, calls = counted()
    images = random_images(5, 3, 4, 4)
    first = reference_features(net, images, folder=tmp_path / "new")
    assert calls == [5]
    assert torch.equal(first, features(net, images))
    again = reference_features(net, images.clone(), folder=tmp_path / "new")
    assert calls == [5, 5]
    assert torch.equal(first, again)
    assert [p.suffix for p in (tmp_path / "new").iterdir()] == [".safetensors"]


def test_other_images_shapes_and_networks_are_other_features(tmp_path: Path) -> None:
    net, calls = counted()
    images = random_images(4, 3, 4, 4)
    changed = images.clone()
    changed[-1, -1, -1, -1] ^= 1
    for some in (images, changed, images.view(4, 3, 2, 8), images[:3]):
        reference_features(net, some, folder=tmp_path)
    reference_features(FeatureNet(net.name, net.module, "2"), images, folder=tmp_path)
    assert calls == [4, 4, 4, 3, 4]
    assert len(list(tmp_path.iterdir())) == 5


def test_the_cache_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    reference_features(counted()[0], random_images(2, 3, 4, 4))
    assert len(list((tmp_path / "pushforward" / "features").glob("Counted-*.safetensors"))) == 1
    for useless in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", useless)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert cache_folder() == tmp_path / ".cache" / "pushforward"


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def rewritten(change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    """The file with other features, and a sum that fits them."""

    def damage(path: Path) -> None:
        with safetensors.safe_open(path, "pt") as file:
            about, found = file.metadata(), change(file.get_tensor("features"))
        safetensors.torch.save_file({"features": found}, path, {**about, "sha256": module._digest(found)})

    return damage


def other_key(path: Path) -> None:
    with safetensors.safe_open(path, "pt") as file:
        about, found = file.metadata(), file.get_tensor("features")
    safetensors.torch.save_file({"features": found}, path, {**about, "key": "another"})


def other_name(path: Path) -> None:
    safetensors.torch.save_file({"images": torch.zeros(5, 3)}, path)


@pytest.mark.parametrize(
    "damage",
    [
        truncated, empty, one_bit, other_key, other_name,
        rewritten(lambda x: x[:4].clone()), rewritten(lambda x: x.flatten()), rewritten(lambda x: x.double()),
    ],
    ids=["truncated", "empty", "bit", "key", "name", "count", "shape", "dtype"],
)  # fmt: skip
def test_a_damaged_file_is_refused_by_name(damage: Callable[[Path], None], tmp_path: Path) -> None:
    net, _ = counted()
    images = random_images(5, 3, 4, 4)
    expected = reference_features(net, images, folder=tmp_path)
    (path,) = tmp_path.iterdir()
    damage(path)
    with pytest.raises(PushforwardError, match=re.escape(f"{path} is damaged; remove it.")):
        reference_features(net, images, folder=tmp_path)
    path.unlink()
    assert torch.equal(reference_features(net, images, folder=tmp_path), expected)


def test_where_nothing_can_be_written_nothing_is_kept(tmp_path: Path) -> None:
    """A file in the place of the folder stops even root."""
    (tmp_path / "file").write_text("")
    net, calls = counted()
    for _ in range(2):
        assert reference_features(net, random_images(2, 3, 4, 4), folder=tmp_path / "file").shape == (2, 3)
    assert len(calls) == 2


# -- fashion ----------------------------------------------------------------------------------------------------------


def test_fashion_tells_drawn_trousers_from_a_drawn_bag() -> None:
    """Classes 1 and 8: two drawings that any network trained on the data knows and other weights do not."""
    assert classify(torch.cat([trousers(), bag()])).tolist() == [1, 8]


@pytest.mark.skipif(not DATA.exists(), reason="Fashion-MNIST is not on this machine")
def test_fashion_is_right_on_the_first_test_images() -> None:
    """86 %: the card's 89.5 %, less two and a half standard errors of 500 images, 1.4 % each."""
    test = load_images(DATA, split="test")
    labels = classify(test.images[:500])
    assert labels.dtype == torch.int64
    assert (labels == test.labels[:500]).float().mean() > 0.86


def test_fashion_is_small_and_has_a_card() -> None:
    assert (FASHION / "model.safetensors").stat().st_size < 500_000
    assert "MIT (Zalando SE)" in (FASHION / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("shape", [(3, 28, 28), (1, 32, 32)])
def test_fashion_refuses_other_images(shape: tuple[int, ...]) -> None:
    for take in (lambda x: features(feature_net("fashion"), x), classify):
        with pytest.raises(
            PushforwardError, match=f"images of 28x28; these are of {shape[1]}x{shape[2]}, {shape[0]} channel"
        ):
            take(random_images(2, *shape))


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(PushforwardError, match=re.escape(f"{tmp_path / 'model.safetensors'} are missing or damaged")):
        module.load_fashion(tmp_path)


# -- effnet -----------------------------------------------------------------------------------------------------------


def test_effnet_sees_grey_as_colour_of_equal_channels() -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    net, grey = feature_net("effnet"), random_images(2, 1, 28, 28)
    assert net.name == "EffNet"
    assert torch.allclose(features(net, grey), features(net, grey.expand(-1, 3, -1, -1)), atol=1e-4)


def test_effnet_knows_a_photograph() -> None:
    """Matplotlib's portrait of Grace Hopper, an officer: military uniform (652), suit (834) or bow tie (457)."""
    pytest.importorskip("efficientnet_lite_pytorch")
    image = read_image(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False), size=(224, 224))
    net = feature_net("effnet")
    found = features(net, image[None])
    probabilities = net.module.net._fc(found).softmax(1)[0].detach()
    assert int(probabilities.argmax()) in (457, 652, 834)
    assert probabilities[[457, 652, 834]].sum() > 0.5


@pytest.mark.parametrize(("name", "extra"), [("effnet", "evaluate"), ("inception", "fid")])
def test_a_missing_package_is_named(name: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(module: str, *args, **kwargs):
        if module.startswith(("efficientnet", "torch_fidelity")):
            raise ModuleNotFoundError(module)
        return real(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(PushforwardError, match=re.escape(f"pip install 'pushforward[{extra}]'")):
        feature_net(name)


def test_an_unknown_name_is_answered_with_the_known(tmp_path: Path) -> None:
    for name in ("clip", str(tmp_path), str(tmp_path / "none.pt")):
        with pytest.raises(PushforwardError, match=f"no file '{name}'; give effnet, fashion, inception or"):
            feature_net(name)


# -- inception --------------------------------------------------------------------------------------------------------


class StandIn(nn.Module):
    """Takes and answers what `torch_fidelity`'s extractor does, without its weights."""

    scale = 1.0

    def __init__(self, name: str, features_list: list[str]) -> None:
        super().__init__()
        assert (name, features_list) == ("inception-v3-compat", ["2048"])
        self.weight = nn.Parameter(torch.full((), self.scale))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        assert x.dtype == torch.uint8
        assert x.shape[1] == 3
        return (self.weight * x.float().mean((2, 3)),)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    package = types.ModuleType("torch_fidelity")
    inner = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    inner.FeatureExtractorInceptionV3 = StandIn
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, inner.__name__, inner)
    return StandIn


def test_inception_gets_colour_bytes_and_answers_its_first(stand_in: type[StandIn]) -> None:
    net = feature_net("inception")
    assert net.name == "Inception"
    grey = random_images(3, 1, 4, 4)
    assert torch.equal(features(net, grey), grey.float().mean((2, 3)).expand(-1, 3))


def test_inceptions_digest_is_of_its_weights(stand_in: type[StandIn], monkeypatch: pytest.MonkeyPatch) -> None:
    first, again = feature_net("inception").digest, feature_net("inception").digest
    monkeypatch.setattr(stand_in, "scale", 2.0)
    assert first == again != feature_net("inception").digest


def test_weights_that_cannot_be_had_are_said(stand_in: type[StandIn], monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(stand_in, "__init__", offline)
    with pytest.raises(PushforwardError, match=r"cannot be loaded: no route to host\. Go online, or give the path"):
        feature_net("inception")


# -- TorchScript ------------------------------------------------------------------------------------------------------


def test_a_torchscript_file_is_named_after_itself(tmp_path: Path) -> None:
    net, images = scripted(Scripted(), tmp_path / "mine.pt"), random_images(5, 1, 4, 4)
    assert net.name == "mine"
    assert torch.equal(features(net, images, batch=2), images.float().mean((2, 3)).expand(-1, 3))


def test_one_that_is_asked_for_features_is_inception(tmp_path: Path) -> None:
    net, images = scripted(ScriptedInception(), tmp_path / "inception-2015-12-05.pt"), random_images(2, 3, 4, 4)
    assert net.name == "Inception"
    assert torch.equal(features(net, images), images.float().mean((2, 3)))


def test_digests_tell_networks_apart(tmp_path: Path) -> None:
    some = [scripted(net, tmp_path / "one.pt").digest for net in (Scripted(), ScriptedInception())]
    some.append(feature_net("fashion").digest)
    assert len(set(some)) == 3
    assert feature_net("fashion").digest == some[2]


def test_a_damaged_torchscript_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    path.write_bytes(b"no network")
    with pytest.raises(PushforwardError, match=re.escape(f"{path} is not a TorchScript file")):
        feature_net(str(path))


@pytest.mark.parametrize(
    ("net", "reason"),
    [(ScriptedImages(), r"must answer features \(2, d\); got \(2, 3, 4, 4\)"),
     (ScriptedPicky(), r"does not take uint8 images of shape \(2, 3, 4, 4\): .*mat1 and mat2")],
)  # fmt: skip
def test_a_torchscript_network_that_does_not_fit_is_refused(net: nn.Module, reason: str, tmp_path: Path) -> None:
    with pytest.raises(PushforwardError, match=reason) as error:
        features(scripted(net, tmp_path / "net.pt"), random_images(2, 3, 4, 4))
    assert "\n" not in str(error.value)


# -- published statistics ---------------------------------------------------------------------------------------------


def test_published_statistics_are_read_exactly(tmp_path: Path) -> None:
    mean, covariance = np.arange(3.0), np.eye(3) / 3
    np.savez(tmp_path / "stats.npz", mu=mean, sigma=covariance, other=np.zeros(2))
    found = published_statistics(tmp_path / "stats.npz")
    assert [x.dtype for x in found] == [torch.float64] * 2
    assert np.array_equal(found[0].numpy(), mean)
    assert np.array_equal(found[1].numpy(), covariance)


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"mu": np.zeros(3)}, "lacks the array mu or sigma"),
        ({"mu": np.zeros(3), "sigma": np.eye(2)}, r"they are \(3,\) and \(2, 2\)"),
        ({"mu": np.zeros((1, 3)), "sigma": np.eye(3)}, r"they are \(1, 3\) and \(3, 3\)"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, r"they are \(0,\)"),
        ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "not all finite"),
        ({"mu": np.array(["a"]), "sigma": np.eye(1)}, "cannot be read"),
        ({"mu": np.array([None]), "sigma": np.eye(1)}, "cannot be read"),
    ],
)
def test_other_arrays_are_no_statistics(arrays: dict[str, np.ndarray], reason: str, tmp_path: Path) -> None:
    path = tmp_path / "stats.npz"
    np.savez(path, **arrays)
    with pytest.raises(PushforwardError, match=reason) as error:
        published_statistics(path)
    assert str(path) in str(error.value)


def test_other_files_are_no_statistics(tmp_path: Path) -> None:
    with pytest.raises(PushforwardError, match="no file of statistics"):
        published_statistics(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("text")
    np.save(tmp_path / "array.npy", np.zeros(3))
    for name in ("text.npz", "array.npy"):
        with pytest.raises(PushforwardError, match=f"{name} cannot be read"):
            published_statistics(tmp_path / name)
