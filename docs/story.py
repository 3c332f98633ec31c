"""Draw with the embedded models what the package can do, and show it on one page with the command of each picture.

    python docs/story.py demo

The folder gets the results of all commands, `index.html`, and `demo.png`, the picture at the top of the README.
`--keep docs/images` copies the pictures that the documentation shows.
"""

import argparse
import html
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pushforward.data.pictures import compared, save_image


class Chapter(NamedTuple):
    """What is done: in words, by commands, and the picture that shows it."""

    title: str
    text: str
    commands: list[str]
    picture: str


THINGS = " ".join(
    f"--prompt '{text}'"
    for text in (
        "guitar, objects, twemoji", "rocket, travel & places, twemoji", "house building, travel & places, noto",
        "slice of pizza, food & drink, twemoji", "red apple, food & drink, noto",
        "automobile, travel & places, noto", "cat face, animals & nature, noto", "umbrella, travel & places, twemoji",
        "france flag, flags, noto", "man health worker, people & body, noto",
    )
)  # fmt: skip
PEOPLE = " ".join(
    f"--prompt '{name}, people & body, noto'"
    for name in (
        "man health worker", "woman, medium skin tone", "woman facepalming", "man: blond hair, light skin tone",
    )
)  # fmt: skip
STORY = [
    Chapter(
        "Sample", "Three diffusions on clothes, and a model of emoji that reads prompts.",
        [f"sample fashion-{name} --count 20 --out fashion-{name}.png --each images-{name}"
         for name in ("vp", "blurring", "langevin")]
        + [f"sample emoji-2 --count 20 --guidance 3 --out emoji.png --each emoji {THINGS}"],
        "fashion-vp.png",
    ),
    Chapter(
        "All steps at once", "The images of 100 steps, in about a tenth as many rounds. Each frame is a round.",
        ["sample fashion-vp --solver ddim --steps 100 --count 4 --out steps.png --each steps",
         "sample fashion-vp --solver ddim --steps 100 --count 4 --parallel --out rounds.png --each rounds"
         " --animate rounds.gif --json rounds.json"],
        "rounds.gif",
    ),
    Chapter(
        "Translate", "From one drawing style to the other, without pairs. The numbers are distances to the source.",
        [f"sample emoji-2 --count 8 --guidance 2 --out noto.png --each noto {PEOPLE}",
         "translate noto --source emoji-2 --source-prompt noto --target-prompt twemoji --steps 50 --out twemoji"],
        "twemoji/sheet.png",
    ),
    Chapter(
        "Edit", "One class becomes another, and the rest of the image stays.",
        ["sample fashion-vp --label sneaker --count 6 --out shoes.png --each shoes",
         "translate shoes --source fashion-vp --source-label sneaker --target-label 'ankle boot' --start 0.8"
         " --out boots"],
        "boots/sheet.png",
    ),
    Chapter(
        "Find the code behind an image", "Decoded, it gives the image back. Below is the greatest error of any value.",
        ["invert fashion-vp shoes --label sneaker --steps 50 --out codes.safetensors --picture inverted.png",
         "decode codes.safetensors --out again.png --each again"],
        "inverted.png",
    ),
    Chapter(
        "Inpaint", "The right half is painted anew, twice; the left half is kept, bit for bit.",
        ["inpaint fashion-vp shoes --mask half.png --label sneaker --steps 25 --repeats 4 --draws 2 --out painted"],
        "painted/sheet.png",
    ),
    Chapter(
        "Guide", "Chains look for codes whose images a classifier calls sneakers; below each is its energy.",
        ["guide fashion-vp --energy classifier:fashion:label=sneaker:weight=5 --solver dpm++:steps=4 --chains 4"
         " --moves 160 --warm-up 120 --anneal 120 --out sneakers"],
        "sneakers/chains.png",
    ),
]  # fmt: skip
STYLE = """body { font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem; }
img { max-width: 100%; } pre { background: #f2f2f2; padding: .7rem; overflow-x: auto; }"""


def run(folder: Path) -> None:
    """Run every command in the folder."""
    half = np.zeros((28, 28), np.uint8)
    half[:, 14:] = 255
    save_image(Image.fromarray(half), folder / "half.png")
    for chapter in STORY:
        for command in chapter.commands:
            print(f"pushforward {command}", flush=True)
            subprocess.run([sys.executable, "-m", "pushforward", *shlex.split(command), "-q"], cwd=folder, check=True)


def page(folder: Path) -> None:
    """Write `index.html`."""
    parts = ["<!doctype html><meta charset=utf-8><title>Pushforward</title>", f"<style>{STYLE}</style>"]
    parts.append("<h1>What Pushforward does</h1><p>Drawn with the models that come with the package.</p>")
    for chapter in STORY:
        words = html.escape("\n".join(f"pushforward {command}" for command in chapter.commands))
        parts.append(f"<h2>{chapter.title}</h2><p>{chapter.text}</p><img src='{chapter.picture}'><pre>{words}</pre>")
    (folder / "index.html").write_text("\n".join(parts) + "\n", encoding="utf-8")


def images(*paths: Path) -> Tensor:
    """Read pictures of one size as `(count, 3, height, width)` in [-1, 1]."""
    arrays = [np.asarray(Image.open(path).convert("RGB"), np.float32) / 127.5 - 1 for path in paths]
    return torch.from_numpy(np.stack(arrays)).movedim(3, 1)


def first(folder: Path, count: int = 4) -> Tensor:
    return images(*sorted(folder.glob("*.png"))[:count])


def poster(folder: Path) -> Image.Image:
    """Put the chapters on one picture, in two columns."""
    kinds = {"images-vp": "noise (VP)", "images-blurring": "blurring", "images-langevin": "Langevin"}
    rounds = json.loads((folder / "rounds.json").read_text(encoding="utf-8"))["rounds"]
    painted = [images(*(folder / "painted" / "images" / f"{i:05d}-{k}.png" for i in range(4))) for k in range(2)]
    known = first(folder / "shoes").clone()
    known[..., 14:] = 0
    chains = sorted((folder / "sneakers" / "steps").glob("*.png"))
    walked = [images(path)[0].unflatten(2, (4, -1)).movedim(2, 0) for path in (chains[0], chains[-1])]
    panels = [
        compared([first(folder / name) for name in kinds], names=[*kinds.values()],
                 title="Sample: three diffusions, every solver on each"),
        compared([first(folder / "emoji")], names=["emoji"], title="Sample by prompts: guitar, rocket, house, pizza"),
        compared([first(folder / "noto"), first(folder / "twemoji" / "images")], names=["Noto", "Twemoji"],
                 title="Translate: one style into another, without pairs"),
        compared([first(folder / "steps"), first(folder / "rounds")], names=["100 calls", f"{rounds} rounds"],
                 title="All steps at once: the same images in a tenth of the rounds"),
        compared([first(folder / "shoes"), known, *painted], names=["image", "kept", "painted", "painted again"],
                 title="Inpaint: what is kept stays, bit for bit"),
        compared([first(folder / "shoes"), first(folder / "boots" / "images")], names=["sneaker", "ankle boot"],
                 title="Edit: another class, the rest stays"),
        compared(walked, names=["before", "guided"], title="Guide: by a classifier, here towards sneakers"),
        compared([first(folder / "shoes"), first(folder / "again")], names=["image", "code, decoded"],
                 title="Invert: find the code behind an image"),
    ]  # fmt: skip
    columns = [[panels[k] for k in (0, 3, 5, 7)], [panels[k] for k in (1, 2, 4, 6)]]
    widths = [max(panel.width for panel in column) for column in columns]
    height = max(sum(panel.height + 12 for panel in column) for column in columns)
    canvas = Image.new("RGB", (sum(widths) + 30, height), "white")
    for left, column in zip((0, widths[0] + 30), columns, strict=True):
        top = 0
        for panel in column:
            canvas.paste(panel, (left, top))
            top += panel.height + 12
    return canvas


def main(folder: str, keep: str | None = None, *, draw: bool = True) -> None:
    """Run the commands, and write the page and the poster."""
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    if draw:
        run(out)
    page(out)
    save_image(poster(out), out / "demo.png")
    names = {chapter.picture: chapter.title.split()[0].lower() for chapter in STORY}
    for picture, name in {**names, "demo.png": "demo", "emoji.png": "emoji"}.items() if keep else ():
        shutil.copy(out / picture, Path(keep) / f"{name}{Path(picture).suffix}")
    print(f"Open {out / 'index.html'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="where to draw")
    parser.add_argument("--keep", help="copy the pictures of the documentation there")
    parser.add_argument("--pages-only", dest="draw", action="store_false", help="use what an earlier run drew")
    main(**vars(parser.parse_args()))
