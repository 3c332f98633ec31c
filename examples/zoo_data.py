"""Make the data files that the embedded models were trained on.

    python examples/zoo_data.py fashion FOLDER fashion.npz
    python examples/zoo_data.py emoji NOTO_PACKAGE TWEMOJI_PACKAGE emoji32.npz

`FOLDER` holds the four `*-ubyte` or `*-ubyte.gz` files of Fashion-MNIST (github.com/zalandoresearch/fashion-mnist, or
the Debian package dataset-fashion-mnist). The other packages are npm's emoji-datasource-google and
emoji-datasource-twitter 16.0.0, unpacked (`npm pack emoji-datasource-google@16.0.0`, then `tar xf`).

Noto Emoji is under Apache-2.0 (Google), Twemoji under CC-BY 4.0 (Twitter), Fashion-MNIST under MIT (Zalando SE).
"""

import argparse
import gzip
import json
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ["T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]


def read_idx(folder: Path, name: str, header: int) -> np.ndarray:
    """The bytes of an idx file after its header."""
    plain, packed = folder / name, folder / f"{name}.gz"
    data = plain.read_bytes() if plain.exists() else gzip.decompress(packed.read_bytes())
    return np.frombuffer(data, np.uint8, offset=header)


def fashion(folder: Path, out: Path) -> None:
    """Fashion-MNIST as one file, with the names of its classes."""
    arrays = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        arrays[f"x_{split}"] = read_idx(folder, f"{prefix}-images-idx3-ubyte", 16).reshape(-1, 28, 28, 1)
        arrays[f"y_{split}"] = read_idx(folder, f"{prefix}-labels-idx1-ubyte", 8)
    np.savez(out, classes=np.array(CLASSES), **arrays)


def read_emoji(package: Path, vendor: str, image: str) -> np.ndarray:
    """One emoji on white, 32 x 32: means over 2 x 2 pixels of the 64 x 64 picture."""
    picture = Image.open(package / "img" / vendor / "64" / image).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    pixels = np.asarray(white.convert("RGB").resize((64, 64), Image.Resampling.LANCZOS), np.float32)
    return pixels.reshape(32, 2, 32, 2, 3).mean((1, 3)).round().astype(np.uint8)


def emoji(noto: Path, twemoji: Path, out: Path) -> None:
    """Both styles of every emoji that both have; a tenth of the names, with all skin tones, is kept for testing."""
    rows = []
    for entry in json.loads((noto / "emoji.json").read_text()):
        for item in (entry, *(v for _, v in sorted(entry.get("skin_variations", {}).items()))):
            if entry.get("has_img_google") and entry.get("has_img_twitter"):
                rows += [(item["image"], entry["name"].lower())] * bool(
                    item.get("has_img_google") and item.get("has_img_twitter")
                )
    names = np.unique([name for _, name in rows])
    held_out = set(np.random.default_rng(0).permutation(names)[: len(names) // 10].tolist())
    test = np.array([name in held_out for _, name in rows])
    styles = [
        np.stack([read_emoji(package, vendor, image) for image, _ in rows])
        for package, vendor in ((noto, "google"), (twemoji, "twitter"))
    ]
    arrays = {}
    for split, chosen in (("train", ~test), ("test", test)):
        arrays[f"x_{split}"] = np.concatenate([pictures[chosen] for pictures in styles])
        arrays[f"y_{split}"] = np.repeat([0, 1], chosen.sum())
        arrays[f"names_{split}"] = np.array([name for (_, name), c in zip(rows, chosen, strict=True) if c])
    np.savez(out, classes=np.array(["google", "twitter"]), **arrays)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="name", required=True)
    one = commands.add_parser("fashion")
    one.add_argument("folder", type=Path)
    two = commands.add_parser("emoji")
    two.add_argument("noto", type=Path)
    two.add_argument("twemoji", type=Path)
    for command in (one, two):
        command.add_argument("out", type=Path)
    given = vars(parser.parse_args())
    {"fashion": fashion, "emoji": emoji}[given.pop("name")](**given)
