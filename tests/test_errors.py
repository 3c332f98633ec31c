"""Errors that a user can mend are `ValueError`s, and no handler of those says them in other words."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from pushforward.data.datasets import load_images
from pushforward.errors import PushforwardError
from pushforward.linear import VP, Operator
from pushforward.maps.generator import gan


class Faulty(VP):
    """A process with an error of its own to tell."""

    def covariance(self, t: Tensor) -> Operator:
        raise PushforwardError(f"No covariance at {len(t)} times.")


def square(latents: Tensor) -> Tensor:
    return latents.square()  # no images


def test_an_argument_that_does_not_fit_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="no diffusion from data to noise"):
        VP(beta_min=-1.0)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda _: Faulty(), r"No covariance at \d+ times\."),
        (lambda _: gan(square, 3), "Generator 'square' must make images .*"),
        (load_images, r".*\.npz has no array .*"),
    ],
)
def test_an_error_of_ours_keeps_its_sentence(call: Callable[[Path], object], sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, numbers=np.zeros(3))
    with pytest.raises(PushforwardError) as error:
        call(path)
    assert re.fullmatch(sentence, str(error.value)), error.value
