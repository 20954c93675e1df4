"""Diffusers and transformers models with random weights, as small as their classes allow, and pipelines of them."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import diffusers
import torch
import transformers
from torch import Tensor, nn

from vislora.lora import Adapter, LowRankWeights

DIFFUSERS = tuple(int(part) for part in diffusers.__version__.split(".")[:2])
WIDTH = 16  # of the text encoders


def unet(**changes) -> nn.Module:
    """UNet2DConditionModel as in Stable Diffusion 1, with one level of attention."""
    config = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return _seeded(lambda: diffusers.UNet2DConditionModel(**config | changes))


def unet_sdxl(layers_per_block: int = 2) -> nn.Module:
    """The same class as in SDXL: linear proj_in and proj_out, two transformer blocks a level, two residual blocks."""
    return unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=layers_per_block,
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=2 * WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
    )


def clip(cls: type[nn.Module] = transformers.CLIPTextModel) -> nn.Module:
    config = transformers.CLIPTextConfig(
        vocab_size=54,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=WIDTH,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )
    return _seeded(lambda: cls(config))


def t5(feed_forward: str = "gated-gelu", width: int = WIDTH) -> nn.Module:
    size = {"vocab_size": 54, "d_model": width, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    config = transformers.T5Config(**size, feed_forward_proj=feed_forward)
    return _seeded(lambda: transformers.T5EncoderModel(config))


def tokenizer(folder: Path) -> transformers.CLIPTokenizer:
    """Letters and the two special tokens; `folder` gets its files."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(ord("a") + i) for i in range(26)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def stable_diffusion(folder: Path) -> diffusers.StableDiffusionPipeline:
    pipe = diffusers.StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=clip(),
        tokenizer=tokenizer(folder),
        unet=unet(),
        scheduler=_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stable_diffusion_xl(folder: Path) -> diffusers.StableDiffusionXLPipeline:
    words = tokenizer(folder)
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=clip(),
        text_encoder_2=clip(transformers.CLIPTextModelWithProjection),
        tokenizer=words,
        tokenizer_2=words,
        unet=unet_sdxl(),
        scheduler=_scheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stable_diffusion_3(folder: Path) -> diffusers.StableDiffusion3Pipeline:
    words = tokenizer(folder)
    transformer = lambda: diffusers.SD3Transformer2DModel(  # noqa: E731
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
        out_channels=4,
        pos_embed_max_size=8,
    )
    pipe = diffusers.StableDiffusion3Pipeline(
        vae=_vae(shift_factor=0.1),
        text_encoder=clip(transformers.CLIPTextModelWithProjection),
        text_encoder_2=clip(transformers.CLIPTextModelWithProjection),
        text_encoder_3=t5(width=2 * WIDTH),
        tokenizer=words,
        tokenizer_2=words,
        tokenizer_3=words,
        transformer=_seeded(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux(folder: Path) -> diffusers.FluxPipeline:
    words = tokenizer(folder)
    transformer = lambda: diffusers.FluxTransformer2DModel(  # noqa: E731
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    pipe = diffusers.FluxPipeline(
        vae=_vae(shift_factor=0.1),
        text_encoder=clip(),
        text_encoder_2=t5(),
        tokenizer=words,
        tokenizer_2=words,
        transformer=_seeded(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: diffusers.DiffusionPipeline, **arguments) -> Tensor:
    """One image of the pipeline in [0, 1], [1, h, w, 3], the same for the same weights."""
    settings = {"num_inference_steps": 2, "guidance_scale": 4.0, "height": 16, "width": 16, "output_type": "np"}
    noise = torch.Generator().manual_seed(1)
    return torch.from_numpy(pipe("a blue jay", generator=noise, **settings | arguments).images)


def trained(
    pipe: diffusers.DiffusionPipeline,
    pick: Callable[[str], bool] = lambda name: name.endswith(("to_q", "to_v", "to_out.0", "q_proj", "v_proj")),
    rank: Callable[[str], int] = lambda name: 3,
    alpha: Callable[[str], float] = lambda name: 6.0,
    components: Sequence[str] = ("unet", "text_encoder", "text_encoder_2"),
    dora: bool = False,
) -> Adapter:
    """An adapter of the pipeline as training might leave it, on the layers whose names `pick` likes."""
    draws = torch.Generator().manual_seed(3)
    layers = {}
    for component in components:
        for module, layer in getattr(pipe, component, nn.Identity()).named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d) and pick(f"{component}.{module}"):
                name, weight = f"{component}.{module}", layer.weight
                r, ones = rank(name), [1] * (weight.dim() - 2)
                a = torch.randn(r, *weight.shape[1:], generator=draws) / weight[0].numel() ** 0.5
                b = 0.5 * torch.randn(weight.shape[0], r, *ones, generator=draws) / r**0.5
                lengths = weight.detach().flatten(1).norm(dim=1)
                magnitude = lengths * (1 + 0.2 * torch.randn(len(lengths), generator=draws)) if dora else None
                layers[name] = LowRankWeights(a, b, r, alpha(name), weight.shape[0], magnitude=magnitude)
    return Adapter(layers)


def in_files(name: str) -> str:
    """A layer's name with CLIP's level `text_model`, which files have and models only before transformers 5.6."""
    return name.replace("text_encoder.encoder.", "text_encoder.text_model.encoder.")


def delta(weights: LowRankWeights) -> Tensor:
    """s B A of a layer with one pair over all rows, [out, in * kernel]."""
    return weights.scale * weights.lora_B.flatten(1) @ weights.lora_A.flatten(1)


def _vae(**changes: float) -> nn.Module:
    size = {"block_out_channels": (8, 8), "norm_num_groups": 4, "sample_size": 16}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return _seeded(lambda: diffusers.AutoencoderKL(**size, **blocks, **changes))


def _scheduler() -> diffusers.SchedulerMixin:
    return diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)


def _seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().eval()
