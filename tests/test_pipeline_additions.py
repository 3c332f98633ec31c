"""What is added to pipelines acts in their models: LoRA, image prompts, several control networks.

Tiny random networks. Each changes the answers, and rows asked together are single calls', to 1e-5 of the largest value
in float32, as batches round otherwise.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from torch import Tensor

import pushforward as pf
from pushforward.model import Network
from support.pipelines import flux, stable_diffusion

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),
]
CALL: dict[str, Any] = {"prompt": "a fox", "guidance_scale": 3.0, "height": 8, "width": 8}
RANK = 2


def answers(pipe: Any, **call: Any) -> Tensor:
    """Answers to three rows at three times, which are those of single calls."""
    model = pf.from_pipeline(pipe, **{**CALL, **call})
    u = torch.randn(model.state_shape(3), generator=torch.Generator().manual_seed(1))
    network = model.denoiser
    assert isinstance(network, Network)
    t = model.process.t_max * torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64) * network.time_scale
    with torch.no_grad():
        found = network.module(u, t)
        single = torch.cat([network.module(*row) for row in zip(u.split(1), t.split(1), strict=True)])
    assert float((found - single).abs().max()) <= 1e-5 * float(single.abs().max())
    return found


def differ(one: Tensor, other: Tensor) -> bool:
    """By far more than rounding."""
    return float((one - other).abs().max()) > 1e-2 * float(other.abs().max())


def lora(network: torch.nn.Module, prefix: str, ends: tuple[str, ...]) -> dict[str, Tensor]:
    """Random low-rank changes of layers, named as `save_lora_weights` names them."""
    weights = {}
    for name, layer in network.named_modules():
        if isinstance(layer, torch.nn.Linear) and name.endswith(ends):
            weights[f"{prefix}.{name}.lora_A.weight"] = torch.randn(RANK, layer.in_features)
            weights[f"{prefix}.{name}.lora_B.weight"] = torch.randn(layer.out_features, RANK)
    assert weights
    return weights


@pytest.mark.parametrize("make", [stable_diffusion, flux], ids=["unet", "transformer"])
def test_lora(make: Callable[[Path], Any], tmp_path: Path) -> None:
    """Weighed, fused, and taken off again."""
    pipe = make(tmp_path)
    network = pipe.unet if make is stable_diffusion else pipe.transformer
    if make is flux:
        torch.nn.init.normal_(network.proj_out.weight, std=0.1)
    bare = answers(pipe)
    prefix = "unet" if make is stable_diffusion else "transformer"
    ends = ("to_q", "to_v", "ff.net.0.proj")
    pipe.load_lora_weights(lora(network, prefix, ends), adapter_name="one")
    whole = answers(pipe)
    assert differ(whole, bare)
    pipe.load_lora_weights(lora(network, prefix, ("to_k",)), adapter_name="two")
    pipe.set_adapters(["one", "two"], [0.5, 1.0])
    both = answers(pipe)
    assert differ(both, whole)
    pipe.fuse_lora()
    assert float((answers(pipe) - both).abs().max()) <= 1e-4 * float(both.abs().max())
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert float((answers(pipe) - bare).abs().max()) <= 1e-4 * float(bare.abs().max())


def test_lora_by_call(tmp_path: Path) -> None:
    """The weight that a call gives to LoRA acts too."""
    pipe = stable_diffusion(tmp_path)
    bare = answers(pipe)
    pipe.load_lora_weights(lora(pipe.unet, "unet", ("to_q", "to_v")))
    off = answers(pipe, cross_attention_kwargs={"scale": 0.0})
    assert float((off - bare).abs().max()) <= 1e-5 * float(bare.abs().max())
    assert differ(answers(pipe, cross_attention_kwargs={"scale": 0.7}), bare)


def image_encoder() -> Any:
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPVisionConfig(**sizes, projection_dim=6, image_size=8, patch_size=4)
    return transformers.CLIPVisionModelWithProjection(config).eval()


def adapter(network: Any, width: int, tokens: int = 4) -> dict[str, dict[str, Tensor]]:
    """A random IP-Adapter: tokens of an image's embedding, and keys and values of them for each attention."""
    inner = network.config.cross_attention_dim
    project = {"proj.weight": torch.randn(tokens * inner, width), "proj.bias": torch.randn(tokens * inner),
               "norm.weight": torch.ones(inner), "norm.bias": torch.zeros(inner)}  # fmt: skip
    layers, number = {}, 1
    for name in network.attn_processors:
        if name.endswith("attn2.processor"):
            size = network.get_submodule(name.removesuffix(".processor")).to_q.out_features
            layers |= {f"{number}.to_k_ip.weight": torch.randn(size, inner),
                       f"{number}.to_v_ip.weight": torch.randn(size, inner)}  # fmt: skip
            number += 2
    return {"image_proj": project, "ip_adapter": layers}


@pytest.mark.parametrize("given", ["image", "embeddings"])
def test_image_prompts(given: str, tmp_path: Path) -> None:
    """An IP-Adapter, told an image or its embedding; its weight counts."""
    from PIL import Image

    plain = stable_diffusion(tmp_path)
    bare = answers(plain)
    extractor = transformers.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    parts = {
        name: part for name, part in plain.components.items() if name not in ("image_encoder", "feature_extractor")
    }
    pipe = diffusers.StableDiffusionPipeline(
        **parts, image_encoder=image_encoder(), feature_extractor=extractor, requires_safety_checker=False
    )
    pipe.load_ip_adapter(adapter(pipe.unet, 6), subfolder=None, weight_name=None)

    def told(shade: int) -> dict[str, Any]:
        if given == "embeddings":
            embeds = torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(shade))
            return {"ip_adapter_image_embeds": [embeds]}
        return {"ip_adapter_image": Image.effect_noise((12, 12), shade).convert("RGB")}

    one = answers(pipe, **told(40))
    assert differ(one, bare)
    assert differ(answers(pipe, **told(200)), one)
    pipe.set_ip_adapter_scale(0.0)
    assert float((answers(pipe, **told(40)) - bare).abs().max()) <= 1e-5 * float(bare.abs().max())


def control(network: Any, seed: int) -> Any:
    """A control network of random weights, also in the layers that begin at zero."""
    torch.manual_seed(seed)
    made = diffusers.ControlNetModel.from_unet(network, conditioning_embedding_out_channels=(4, 8))
    for block in (*made.controlnet_down_blocks, made.controlnet_mid_block, made.controlnet_cond_embedding.conv_out):
        torch.nn.init.normal_(block.weight, std=0.3)
    return made.eval()


def test_several_control_networks(tmp_path: Path) -> None:
    """Each image and each weight counts, and no weight is none."""
    plain = stable_diffusion(tmp_path)
    bare = answers(plain)
    parts = {name: part for name, part in plain.components.items() if name != "image_encoder"}
    pipe = diffusers.StableDiffusionControlNetPipeline(
        **parts, controlnet=[control(plain.unet, 1), control(plain.unet, 2)], requires_safety_checker=False
    )
    images = list(torch.rand(2, 1, 3, 8, 8))
    both = answers(pipe, image=images)
    assert differ(both, bare)
    assert differ(answers(pipe, image=[images[0], images[0]]), both)
    assert differ(answers(pipe, image=images, controlnet_conditioning_scale=[1.0, 0.3]), both)
    none = answers(pipe, image=images, controlnet_conditioning_scale=[0.0, 0.0])
    assert float((none - bare).abs().max()) <= 1e-5 * float(bare.abs().max())
    with pytest.raises(pf.PushforwardError, match="control_guidance_end"):
        answers(pipe, image=images, control_guidance_end=[0.5, 1.0])
