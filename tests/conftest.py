"""Options, seeds and threads for all tests."""

import gc
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import matplotlib
import numpy as np
import pytest
import torch

pytest.register_assert_rewrite("support")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches the network
matplotlib.use("agg")
if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores, and so do the processes they start
    os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
hypothesis.settings.register_profile("pushforward", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("pushforward")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device of the states and networks, for instance cuda")
    parser.addoption("--dtype", default="float32", choices=["float32", "float64"], help="type of states and networks")
    parser.addoption("--unchecked", action="store_true", help="do not check the library's annotations at each call")


def pytest_configure(config: pytest.Config) -> None:
    """Have the library's annotations checked at each call. Comes before its first import."""
    if not config.getoption("--unchecked"):
        from support.type_checks import check_annotations

        check_annotations("pushforward")
    gc.disable()  # until all is imported


def pytest_collection_finish() -> None:
    """Leave what is imported, a million objects, out of the collections of garbage to come."""
    gc.enable()
    gc.freeze()


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    return torch.device(pytestconfig.getoption("--device"))


@pytest.fixture(scope="session")
def dtype(pytestconfig: pytest.Config) -> torch.dtype:
    return getattr(torch, pytestconfig.getoption("--dtype"))


@pytest.fixture(autouse=True)
def seed() -> int:
    """The seed that every test starts from, whichever tests ran before it."""
    value = 0
    random.seed(value)
    np.random.seed(value)  # noqa: NPY002
    torch.manual_seed(value)
    return value


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """A single thread for the tests of a file: more only wait for one another on small networks."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def generator(seed: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(seed)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random CLIP with a vocabulary of letters, 16 x 16 images, as `transformers` writes it."""
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    (path / "vocab.json").write_text(json.dumps({piece: k for k, piece in enumerate(pieces)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    shared = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**shared, "vocab_size": len(pieces), "max_position_embeddings": 20,
            "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}  # fmt: skip
    vision = {**shared, "image_size": 16, "patch_size": 4}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
        model = transformers.CLIPModel(config)
        for parameter in model.parameters():  # the usual weights are so small that all prompts are nearly the same
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": 16}, "resample": 3,
        "do_center_crop": True, "crop_size": {"height": 16, "width": 16}, "do_rescale": True, "do_normalize": True,
        "image_mean": [0.48, 0.45, 0.4], "image_std": [0.27, 0.26, 0.25],
    }  # fmt: skip
    (path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return path


@pytest.fixture(scope="session")
def clip(clip_folder: Path) -> Any:
    """That folder as the library reads it."""
    from pushforward.vision.clip import load_clip

    return load_clip(clip_folder)
