"""Sheets of images: what they show, where, and what stands beside it."""

import numpy as np
import pytest
import torch

from pushforward.data.pictures import compared, sheet
from support.helpers import normal
from support.pictures import places


def grey(images: torch.Tensor) -> np.ndarray:
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().numpy().transpose(0, 2, 3, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_enlarged_without_blur_and_touch_without_names(channels: int) -> None:
    images = normal(5, channels, 4, 6)
    found = np.asarray(sheet(images, columns=3, smallest=12)).reshape(24, 54, channels)
    for i, image in enumerate(grey(images)):
        assert places(found, image.astype(int), 3) == [(i // 3 * 12, i % 3 * 18)]


def test_names_take_room_of_their_own() -> None:
    """Every image is there once, whole; where it is white, something is written."""
    images = normal(5, 1, 4, 4)
    asked = {"columns": 3, "smallest": 12}
    words = {
        "title": {"title": "a title"}, "heads": {"heads": ["a", "b", "c"]}, "rows": {"rows": ["first", "second"]},
        "captions": {"captions": ["one", "two two two two two two two", "", "four", "five"]},
    }  # fmt: skip
    plain = sheet(images, **asked)
    for name, more in words.items():
        found = np.asarray(sheet(images, **asked, **more)).astype(int)
        corners = [places(found, image.astype(int), 3) for image in grey(images)]
        assert [len(each) for each in corners] == [1] * 5, name
        assert found.shape[0] > plain.height
        for [(y, x)] in corners:
            found[y : y + 12, x : x + 12] = 255
        assert (found < 128).any(), name


def test_versions_stand_above_one_another_group_after_group() -> None:
    images = normal(5, 1, 4, 4)
    other = -images
    found = np.asarray(compared([images, other], columns=3, names=["a", "b"], captions=[(), list("12345")])).astype(int)
    above, below = ([places(found, image.astype(int), 24)[0] for image in grey(one)] for one in (images, other))
    assert all(low > high and column == same for (high, column), (low, same) in zip(above, below, strict=True))
    assert above[3][0] > below[0][0]  # the second group below the first
    assert above[3][1] == above[0][1]
