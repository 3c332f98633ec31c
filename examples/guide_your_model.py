"""Guide your own diffusers model by your own PyTorch function.

    python examples/guide_your_model.py                                              # clothes, their left half bright
    python examples/guide_your_model.py --model owner/model --steps 100 --bright 0.3
    python examples/guide_your_model.py --model path/to/stable-diffusion --prompt "a castle" --plan dpm++:steps=20

The model is used as it is: nothing is trained, and the function sees only finished images. The script prints the
function's values before and after, and writes the images in two rows: those of the codes that the chains began at, and
those of the codes that they ended at.
"""

# %% What is needed
import argparse
from pathlib import Path

import torch
from torch import Tensor

import pushforward as pf
from pushforward.data.pictures import save_image, sheet
from pushforward.guidance.posterior import Guided
from pushforward.maps.spec import parse


# %% Your function
# It may be any function that PyTorch differentiates, from images in [-1, 1], `(count, channels, height, width)`, to one
# number each. This one measures the brightness of the left half.
def measured(images: Tensor) -> Tensor:
    """Return the mean of the left half, `(count,)`."""
    return images[..., : images.shape[-1] // 2].mean((1, 2, 3))


# %% Guidance in 12 lines
# An energy is low where an image is as wanted; here, where the measurement is `bright`, give or take `deviation`. The
# chains draw codes z from `N(z; 0, I) exp(-energy)` in `steps` moves, each a gradient through the whole plan.
def guide(
    name: str, bright: float, deviation: float, plan: str, steps: int, chains: int, prompt: str | None = None
) -> tuple[Tensor, Guided]:
    """Draw images of the model alone, and of the same chains once they are guided."""
    model = pf.load(name)
    sampler = pf.Diffusion(model, parse(plan).plan(model)).given(prompt)

    def energy(images: Tensor, code: pf.Code) -> Tensor:  # noqa: ARG001 - this one ignores the code
        return ((measured(images) - bright) / deviation).square() / 2

    found = pf.guide(sampler, energy, pf.mala(0.1), pf.Schedule(steps), chains=chains)
    return sampler.sample(chains), found


# %% All of it
def main(
    name: str = "fashion-vp",
    bright: float = 0.0,
    deviation: float = 0.05,
    plan: str = "dpm++:steps=6",
    steps: int = 20,
    chains: int = 6,
    prompt: str | None = None,
    out: str = "guided.png",
) -> tuple[Tensor, Guided]:
    """Guide, print the measurements, and write the sheet."""
    before, found = guide(name, bright, deviation, plan, steps, chains, prompt)
    for when, images in (("before", before), ("after", found.images)):
        print(f"{when:7}" + "".join(f"{value:7.2f}" for value in measured(images).tolist()))
    print(f"wanted {bright:6.2f} +- {deviation:g}, by {int(found.nfe[0])} network evaluations per chain")
    save_image(sheet(torch.cat([before, found.images]), columns=chains, rows=["before", "after"]), Path(out))
    return before, found


# %% Run
# Longer runs, traces, R-hat and resuming are in `pushforward guide --energy python:mine.py`; see docs/guidance.md.
if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", dest="name", default="fashion-vp", help="embedded model, folder or hub name")
    parser.add_argument("--bright", type=float, default=0.0, help="wanted brightness, from -1 to 1")
    parser.add_argument("--deviation", type=float, default=0.05, help="allowed deviation from it")
    parser.add_argument("--plan", default="dpm++:steps=6", help="solver and steps that turn codes into images")
    parser.add_argument("--steps", type=int, default=20, help="moves per chain")
    parser.add_argument("--chains", type=int, default=6, help="number of chains, which is that of images")
    parser.add_argument("--prompt", help="prompt, for a model that reads them")
    parser.add_argument("--out", default="guided.png", help="picture to write")
    try:
        main(**vars(parser.parse_args()))
    except pf.PushforwardError as error:
        raise SystemExit(str(error)) from None
