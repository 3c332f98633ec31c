"""Draw with your own pipeline of `diffusers`, by samplers of this package.

    python examples/your_pipeline.py                                           # a tiny pipeline with random weights
    python examples/your_pipeline.py --pipeline owner/model --prompt "a red fox" --steps 20

The script prints how far each sampler is from the converged image, and writes a sheet with one row of images each.
"""

# %% What is needed
import argparse
from pathlib import Path

import diffusers
import torch
from torch import Tensor

import pushforward as pf
from pushforward.data.pictures import save_image, sheet
from pushforward.integrations.diffusers import PushforwardScheduler

# %% The samplers
# A solver and its settings; `None` is the scheduler that the pipeline came with. Each step of `heun` calls the network
# twice. With no `grid`, steps are where the pipeline's own scheduler has them.
SAMPLERS: dict[str, dict[str, object] | None] = {
    "its own": None,
    "ddim": {"solver": "ddim"},
    "auto": {"solver": "auto"},
    "gddim": {"solver": "gddim", "order": 2, "grid": "angle"},
    "heun": {"solver": "heun", "grid": "angle"},
    "ddpm": {"solver": "ddpm"},
}
CONVERGED = {"solver": "gddim", "order": 2, "grid": "angle"}
MANY = 100


# %% The pipeline
def pipeline(name: str | None) -> diffusers.DiffusionPipeline:
    """Load a pipeline from a folder or the hub, or make an untrained one, which does all the steps but draws noise."""
    if name is not None:
        return diffusers.DiffusionPipeline.from_pretrained(name)
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()
    return diffusers.DDPMPipeline(unet, diffusers.DDIMScheduler(prediction_type="sample", clip_sample=False))


# %% Images
# All that changes is the pipeline's scheduler. With the same generators all samplers begin from the same noise.
def draw(pipe: diffusers.DiffusionPipeline, steps: int, count: int, prompt: str | None) -> Tensor:
    """Draw images in [-1, 1], `(count, channels, height, width)`."""
    generators = [torch.Generator().manual_seed(k) for k in range(count)]
    if prompt is None:
        found = pipe(batch_size=count, num_inference_steps=steps, generator=generators, output_type="np")
    else:
        found = pipe([prompt] * count, num_inference_steps=steps, generator=generators, output_type="np")
    return 2 * torch.as_tensor(found.images).movedim(-1, 1).float() - 1


def compare(
    pipe: diffusers.DiffusionPipeline, steps: int, count: int, prompt: str | None, many: int = MANY
) -> tuple[dict[str, Tensor], Tensor]:
    """Draw every sampler's images, and the converged ones of the deterministic samplers."""
    own = pipe.scheduler
    images = {}
    for name, settings in SAMPLERS.items():
        pipe.scheduler = own if settings is None else PushforwardScheduler.from_config(own.config, **settings)
        images[name] = draw(pipe, steps, count, prompt)
    pipe.scheduler = PushforwardScheduler.from_config(own.config, **CONVERGED)
    return images, draw(pipe, many, count, prompt)


# %% All of it
def main(
    name: str | None = None,
    prompt: str | None = None,
    steps: int = 10,
    count: int = 4,
    many: int = MANY,
    out: str = "pipeline.png",
) -> dict[str, float]:
    """Draw by every sampler, print the errors, and write the sheet."""
    pipe = pipeline(name)
    pipe.set_progress_bar_config(disable=True)
    images, converged = compare(pipe, steps, count, prompt, many)
    errors = {key: float((value - converged).square().mean().sqrt()) for key, value in images.items()}
    for key, error in errors.items():
        print(f"{key:10} {error:.3f} from the converged images")
    rows = [*images, "converged"]
    save_image(sheet(torch.cat([*images.values(), converged]), columns=count, rows=rows), Path(out))
    return errors


# %% Run
# The folder that `pipe.save_pretrained(...)` writes keeps the scheduler and its settings, and `from_pretrained` reads
# them again wherever this library is installed.
if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", dest="name", help="a folder or a hub name")
    parser.add_argument("--prompt", help="what to draw, for a pipeline that reads prompts")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--count", type=int, default=4, help="images")
    parser.add_argument("--many", type=int, default=MANY, help="steps of the converged images")
    parser.add_argument("--out", default="pipeline.png")
    try:
        main(**vars(parser.parse_args()))
    except pf.PushforwardError as error:
        raise SystemExit(str(error)) from None
