"""Make the data files that the embedded models were trained on.

    python examples/zoo_data.py fashion FOLDER fashion.npz
    python examples/zoo_data.py emoji NOTO_PACKAGE TWEMOJI_PACKAGE FOLDER

`FOLDER` holds the four `*-ubyte` or `*-ubyte.gz` files of Fashion-MNIST (github.com/zalandoresearch/fashion-mnist, or
the Debian package dataset-fashion-mnist). For the emoji, four files are made: each style alone (`emoji-noto.npz`,
`emoji-twemoji.npz`), both together (`emoji.npz`), and these with every emoji about equally often (`emoji-2.npz`): one
without skin tones is repeated as often as others have tones, lest three in five of the images be people. The other
packages are npm's emoji-datasource-google and emoji-datasource-twitter 16.0.0, unpacked (`npm pack
emoji-datasource-google@16.0.0`, then `tar xf`).

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
    """Read the bytes of an idx file after its header."""
    plain, packed = folder / name, folder / f"{name}.gz"
    data = plain.read_bytes() if plain.exists() else gzip.decompress(packed.read_bytes())
    return np.frombuffer(data, np.uint8, offset=header)


def fashion(folder: Path, out: Path) -> None:
    """Write Fashion-MNIST as one file, with the names of its classes."""
    arrays = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        arrays[f"x_{split}"] = read_idx(folder, f"{prefix}-images-idx3-ubyte", 16).reshape(-1, 28, 28, 1)
        arrays[f"y_{split}"] = read_idx(folder, f"{prefix}-labels-idx1-ubyte", 8)
    np.savez(out, classes=np.array(CLASSES), **arrays)


def read_emoji(package: Path, vendor: str, image: str) -> np.ndarray:
    """Read one emoji on white, 32 x 32: means over 2 x 2 pixels of the 64 x 64 picture."""
    picture = Image.open(package / "img" / vendor / "64" / image).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    pixels = np.asarray(white.convert("RGB").resize((64, 64), Image.Resampling.LANCZOS), np.float32)
    return pixels.reshape(32, 2, 32, 2, 3).mean((1, 3)).round().astype(np.uint8)


TONES = {"1F3FB": "light", "1F3FC": "medium light", "1F3FD": "medium", "1F3FE": "medium dark", "1F3FF": "dark"}


def caption(entry: dict, tone: str) -> str:
    """Join the parts of a caption, without the style: name, skin tones, category."""
    tones = [f"{TONES[part]} skin tone" for part in tone.split("-") if part in TONES]
    return ", ".join([entry["name"].lower().replace(",", ""), *dict.fromkeys(tones), entry["category"].lower()])


def emoji(noto: Path, twemoji: Path, folder: Path) -> None:
    """Write every emoji that both styles have; a tenth of the names, with all skin tones, is kept for testing."""
    rows = []
    for entry in json.loads((noto / "emoji.json").read_text()):
        for tone, item in (("", entry), *sorted(entry.get("skin_variations", {}).items())):
            if all(x.get(f"has_img_{vendor}") for x in (entry, item) for vendor in ("google", "twitter")):
                rows.append((item["image"], entry["name"].lower(), caption(entry, tone)))
    names, number, looks = np.unique([name for _, name, _ in rows], return_inverse=True, return_counts=True)
    held_out = set(np.random.default_rng(0).permutation(names)[: len(names) // 10].tolist())
    test = np.array([name in held_out for _, name, _ in rows])
    captions = np.array([text for *_, text in rows])
    times = np.maximum(1, (1 + len(TONES)) // looks[number])
    styles = {
        style: np.stack([read_emoji(package, vendor, image) for image, *_ in rows])
        for style, package, vendor in (("noto", noto, "google"), ("twemoji", twemoji, "twitter"))
    }
    both: dict[str, dict[str, list[np.ndarray]]] = {"emoji": {}, "emoji-2": {}}
    for style, pictures in styles.items():
        alone = {}
        for split, chosen in (("train", ~test), ("test", test)):
            alone |= {f"x_{split}": pictures[chosen], f"captions_{split}": captions[chosen]}
            for name, every in both.items():
                again = times[chosen] if (name, split) == ("emoji-2", "train") else 1
                shown = np.repeat(np.flatnonzero(chosen), again)
                every.setdefault(f"x_{split}", []).append(pictures[shown])
                told = np.array([f"{text}, {style}" for text in captions[shown]])
                every.setdefault(f"captions_{split}", []).append(told)
        np.savez(folder / f"emoji-{style}.npz", **alone)
    for name, every in both.items():
        np.savez(folder / f"{name}.npz", **{key: np.concatenate(parts) for key, parts in every.items()})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="name", required=True)
    one = commands.add_parser("fashion")
    one.add_argument("folder", type=Path)
    two = commands.add_parser("emoji")
    two.add_argument("noto", type=Path)
    two.add_argument("twemoji", type=Path)
    one.add_argument("out", type=Path)
    two.add_argument("folder", type=Path)
    given = vars(parser.parse_args())
    {"fashion": fashion, "emoji": emoji}[given.pop("name")](**given)
