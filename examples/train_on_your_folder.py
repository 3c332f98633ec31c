"""Train a Langevin diffusion on a folder of images, and sample from it.

    python examples/train_on_your_folder.py path/to/images --size 32 --steps 5000
    python examples/train_on_your_folder.py                  # draws some pictures to train on first

The script needs `pip install '.[train]'`. Run the same line again, with the same or more steps, to resume training.
"""

# %% What is needed
import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

import pushforward as pf
from pushforward.data.datasets import load_images
from pushforward.data.pictures import save_image, sheet
from pushforward.training.trainer import Report, TrainConfig, train


# %% Pictures to begin with
# You can use any folder: its sub-folders are classes, files that cannot be read are skipped, sizes may differ.
def draw_pictures(folder: Path, size: int, count: int = 64) -> Path:
    """Draw coloured discs and squares on white, in one sub-folder each."""
    rng = np.random.default_rng(0)
    for name in ("disc", "square"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for k in range(count):
            picture = Image.new("RGB", (size, size), "white")
            r = size * rng.uniform(0.2, 0.35)
            x, y = rng.uniform(r, size - r, 2)
            colour = tuple(int(value) for value in rng.integers(0, 200, 3))
            draw = ImageDraw.Draw(picture)
            (draw.ellipse if name == "disc" else draw.rectangle)((x - r, y - r, x + r, y + r), fill=colour)
            picture.save(folder / name / f"{k:03d}.png")
    return folder


# %% Train, load, sample
# `process` is any of vp, cosine, ve, flow, blurring, langevin and blurring-langevin; nothing else changes. Checkpoints,
# a loss curve and pictures appear in `my-model/training` meanwhile.
def main(
    folder: str | None = None,
    steps: int = 1000,
    out: str = "samples.png",
    *,
    size: int = 32,
    network: str = "small",
    model: str = "my-model",
) -> tuple[Report, Tensor]:
    """Train on a folder, and save a sheet of samples; return the report and the samples."""
    data = load_images(folder or draw_pictures(Path("pictures"), size), size=size)
    config = TrainConfig(process="langevin", network=network, steps=steps, batch=32, save_every=200)
    report = train(config, data, model, callback=tell)

    trained = pf.load(model)
    plan = pf.SOLVERS["gddim"](trained.process, pf.grid.power(trained.process, 20), order=2)
    labels = torch.arange(32) % len(trained.classes) if trained.classes else None
    images = pf.Diffusion(trained, plan).given(labels).sample(32)
    save_image(sheet(images, columns=8), Path(out))

    print(f"{report.parameters:,} parameters, {report.images_per_second:.0f} images per second, loss {report.loss:.3f}")
    print(f"The model is {report.folder}/, its samples are {out}.")
    return report, images


def tell(step: int, loss: float, done: float) -> None:
    """Print a line now and then."""
    if step % 100 == 0:
        print(f"step {step}  loss {loss:.3f}  {done:.0%}")


# %% Run
if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", metavar="FOLDER", help="folder of images; by default, some are drawn")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--size", type=int, default=32, help="side in pixels to crop images to, a multiple of 4")
    parser.add_argument("--network", default="small", help="tiny, small, medium or large")
    parser.add_argument("--model", default="my-model", help="folder for the model")
    parser.add_argument("--out", default="samples.png")
    main(**vars(parser.parse_args()))
