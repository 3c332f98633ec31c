"""What a model made of a pipeline costs beside the pipeline's network, and how many rounds take all steps at once.

    python benchmarks/pipelines.py
    python benchmarks/pipelines.py --quick    # fewer runs, and four steps

Two networks of `diffusers` of some ten million random weights: a U-Net as Stable Diffusion's, with guidance, on latents
of 16 x 16, and a transformer as Flux's on 64 patches of them. A call of `model.module(u, t)` on 16 rows, each at its
own time, is timed in turn with the network's own call on the arguments that it then has (32 rows with guidance). What
is beside the network within the model's call is timed there; the ratio is that of the two calls. Time of the one
thread, medians.

The rounds are those of DDIM's steps for one image, with `parallel`, to several tolerances; of embedded trained networks
as well, medians of eight images. Where GPUs share a round's rows, the busiest has the rows that are waited for.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from _common import table, write_json, write_text
from torch import Tensor

import pushforward
from pushforward.maps.spec import PARALLEL_METHODS

ROWS = 16
TOKENS, WIDTH = 77, 256
TRAINED = ("fashion-vp", "emoji")
GPUS = (1, 4, 8, 16)
TOLERANCES = (1e-1, 1e-2, 1e-3)


def stable_diffusion() -> Any:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    net = UNet2DConditionModel(
        sample_size=16, block_out_channels=(64, 128, 192), layers_per_block=1, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=WIDTH,
    )  # fmt: skip
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
                              set_alpha_to_one=False, steps_offset=1)  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2,
                        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=2)  # fmt: skip
    pipe = StableDiffusionPipeline(vae, None, None, net, scheduler, None, None, requires_safety_checker=False)
    embeds, other = torch.randn(2, 1, TOKENS, WIDTH)
    return pipe, {"prompt_embeds": embeds, "negative_prompt_embeds": other, "guidance_scale": 5.0}


def flux() -> Any:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    net = FluxTransformer2DModel(
        in_channels=16, num_layers=4, num_single_layers=8, attention_head_dim=32, num_attention_heads=6,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, guidance_embeds=True, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2,
                        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=2, shift_factor=0.1)  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = FluxPipeline(scheduler, vae, None, None, None, None, net)
    embeds, pooled = torch.randn(1, TOKENS, WIDTH), torch.randn(1, WIDTH)
    call = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "height": 32, "width": 32}
    return pipe, {**call, "guidance_scale": 3.5}


PIPELINES: dict[str, Callable[[], Any]] = {"Stable Diffusion": stable_diffusion, "Flux": flux}


@torch.no_grad()
def costs(model: Any, net: torch.nn.Module, repeats: int) -> list[float]:
    """Rows and milliseconds of the network's call, milliseconds beside it in the model's, percent, and their ratio."""
    u = torch.randn(model.state_shape(ROWS))
    t = torch.linspace(0.95, 0.05, ROWS, dtype=torch.float64) * model.process.t_max
    t = model.denoiser.time_scale * t + model.denoiser.time_shift
    own, met, inside = net.forward, [], []

    def forward(*args: Any, **kwargs: Any) -> Any:
        began = time.thread_time()
        answer = own(*args, **kwargs)
        inside.append(time.thread_time() - began)
        met[:] = [args, kwargs]
        return answer

    net.forward = forward  # type: ignore[method-assign]
    model.module(u, t)
    args, kwargs = met
    alone, whole, beside = [], [], []
    for _ in range(repeats):
        began = time.thread_time()
        net(*args, **kwargs)
        alone.append(time.thread_time() - began)
        began = time.thread_time()
        model.module(u, t)
        whole.append(time.thread_time() - began)
        beside.append(whole[-1] - inside[-1])
    del net.forward
    rows = next(len(x) for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim > 2)
    network, outside = statistics.median(alone), statistics.median(beside)
    return [rows, 1e3 * network, 1e3 * outside, 100 * outside / network, statistics.median(whole) / network]


@torch.no_grad()
def rounds(model: Any, steps: int, tolerance: float, images: int) -> list[Any]:
    """Rounds and rows that take all steps at once, those of the busiest of several GPUs, and the largest difference."""
    found = []
    method = replace(PARALLEL_METHODS["preconditioned"], tolerance=tolerance)
    for seed in range(images):
        told: list[int] = []
        made = model.sample(1, solver="ddim", steps=steps, seed=seed, parallel=method,
                            callback=lambda r, told=told: told.append(r.nfe))  # fmt: skip
        one = model.sample(1, solver="ddim", steps=steps, seed=seed)
        share = [sum(math.ceil(rows / count) for rows in told) for count in GPUS]
        found.append([len(told), *share, float((made - one).abs().max())])
    return [steps, tolerance, *(statistics.median(column) for column in zip(*found, strict=True))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="runs of each, in turn")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--quick", action="store_true", help="three runs and four steps")
    arguments = parser.parse_args()
    repeats, steps, images = (3, 4, 1) if arguments.quick else (arguments.repeats, arguments.steps, 8)
    warnings.filterwarnings("ignore", ".*further from the sequential ones")
    torch.set_num_threads(1)
    beside, counted = [], []
    for name, make in PIPELINES.items():
        torch.manual_seed(0)
        pipe, call = make()
        net = getattr(pipe, "unet", None) or pipe.transformer
        net.eval()
        millions = sum(p.numel() for p in net.parameters()) / 1e6
        model = pushforward.from_pipeline(pipe, **call)
        beside.append([name, millions, *costs(model, net, repeats)])
        print(*beside[-1], flush=True)
        counted += [[f"{name}, random", *rounds(model, steps, tolerance, 1)] for tolerance in TOLERANCES]
        print(*counted[-1], flush=True)
    for name in TRAINED:
        counted += [[name, *rounds(pushforward.load(name), steps, tolerance, images)] for tolerance in TOLERANCES]
        print(*counted[-1], flush=True)
    columns = ["pipeline", "weights (M)", "rows", "network (ms)", "beside (ms)", "beside (%)", "ratio"]
    text = table(columns, beside)
    text += f"\n\nLargest share beside the network: {max(row[-2] for row in beside):.2f} % (the target is 5 %)."
    busiest = [f"of the busiest of {count}" for count in GPUS[1:]]
    other = ["network", "steps", "tolerance", "rounds", "rows", *busiest, "difference"]
    text += "\n\n" + table(other, counted)
    print("\n" + text)
    write_text("pipelines", f"# Models of pipelines\n\n{ROWS} rows, float32, one thread.\n\n{text}")
    write_json("pipelines", {"columns": columns, "rows": beside, "round columns": other, "rounds": counted})


if __name__ == "__main__":
    main()
