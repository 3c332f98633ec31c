"""Edit a photograph by text, with your own pipeline of `diffusers` and your LoRA.

    python examples/edit_a_photograph.py photo.jpg "a house" "a house in snow" --pipeline owner/model
    python examples/edit_a_photograph.py photo.jpg "a house" "a house in snow" --pipeline owner/model --lora owner/lora

The pipeline is used as it is: whatever it can draw with is what edits. The script prints how far the photograph moved,
and writes it beside what became of it.
"""

# %% What is needed
import argparse
from pathlib import Path

import diffusers
import torch
from torch import Tensor

import pushforward as pf
from pushforward.data.inputs import read_like
from pushforward.data.pictures import save_image, sheet


# %% From a pipeline to an edited photograph in 12 lines
# The photograph's code is found under the text of what it shows, and decoded under the text of what it shall show.
# `start` is the share of the steps that is taken: less of it keeps more of the photograph.
def edit(
    photograph: str, source: str, target: str, name: str, lora: str | None, steps: int, start: float, **call: object
) -> tuple[Tensor, Tensor]:
    """Return the photograph, cut to the pipeline's size, and edited; both `(1, 3, height, width)` in [-1, 1]."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    pipe = diffusers.DiffusionPipeline.from_pretrained(name, torch_dtype=dtype).to(device)
    if lora is not None:
        pipe.load_lora_weights(lora)
    model = pf.from_pipeline(pipe, prompt=source, **call)
    before = read_like(Path(photograph), model.image_shape)[None]
    after = model.edit(before, source, target, solver="ddim", steps=steps, start=start).images
    return before, after


# %% All of it
def main(
    photograph: str,
    source: str,
    target: str,
    pipeline: str,
    lora: str | None = None,
    steps: int = 28,
    start: float = 0.7,
    side: int | None = None,
    out: str = "edited.png",
) -> tuple[Tensor, Tensor]:
    """Edit, print the distance, and write both pictures."""
    sizes = {} if side is None else {"height": side, "width": side}
    before, after = edit(photograph, source, target, pipeline, lora, steps, start, **sizes)
    print(f"{float((after - before).square().mean().sqrt()):.3f} from the photograph, of a range of 2")
    save_image(sheet(torch.cat([before, after]), columns=2, heads=["before", "after"]), Path(out))
    return before, after


# %% Run
if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photograph", help="picture to edit; the square in its middle is")
    parser.add_argument("source", help="what it shows")
    parser.add_argument("target", help="what it shall show")
    parser.add_argument("--pipeline", required=True, help="a folder or a hub name")
    parser.add_argument("--lora", help="a file, a folder or a hub name")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--start", type=float, default=0.7, help="share of the steps that is taken")
    parser.add_argument("--side", type=int, help="side of the images in pixels; by default the pipeline's")
    parser.add_argument("--out", default="edited.png", help="picture to write")
    try:
        main(**vars(parser.parse_args()))
    except pf.PushforwardError as error:
        raise SystemExit(str(error)) from None
