"""A timm model as an eye for pictures: pooled features tell what is on them, channel statistics in what style."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from vislora.config.model import ModelConfig
from vislora.data.cache import weights_key
from vislora.data.transforms import eval_transform
from vislora.errors import ModelError
from vislora.models.vit import build_vit, preprocessing, weights_hash


@dataclass(frozen=True)
class Seen:
    """What a backbone makes of N pictures.

    Attributes:
        pooled: what its classifier would be given, float64 [N, D].
        statistics: mean and standard deviation over the positions of each channel, block by block, float64 [N, S].
    """

    pooled: Tensor
    statistics: Tensor


class Backbone:
    """A timm model without its classifier.

    Attributes:
        name: timm's.
        sha256: of the weights' file; of the tensors themselves where they come from the hub.

    Raises:
        ModelError: it can't be built.
    """

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        try:
            self._model = build_vit(config, 0).requires_grad_(False).to(device)
        except ModelError as error:
            raise ModelError(f"backbone: {error}") from None
        architecture = self._model.pretrained_cfg["architecture"]
        self.name = config.name if config.name.startswith(architecture) else f"{config.name} ({architecture})"
        self.sha256 = weights_hash(config) or weights_key([self._model])
        self._device, self._transform = device, eval_transform(preprocessing(self._model))

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], batch_size: int = 64) -> Seen:
        """Look at RGB pictures."""
        pooled, statistics = [], []
        for start in range(0, len(images), batch_size):
            batch = torch.stack([self._transform(image) for image in images[start : start + batch_size]])
            # NCHW is what every architecture can give its maps in; float64 is nothing that Apple's GPUs hold
            final, maps = self._model.forward_intermediates(batch.to(self._device), output_fmt="NCHW")
            pooled.append(self._model.forward_head(final, pre_logits=True).cpu().double())
            statistics.append(torch.cat([channel_statistics(each) for each in maps], dim=1))
        return Seen(torch.cat(pooled), torch.cat(statistics))


def channel_statistics(maps: Tensor) -> Tensor:
    """Mean and standard deviation of each channel over the positions of maps [B, C, H, W], float64 [B, 2 C]."""
    positions = maps.flatten(2).cpu().double()
    return torch.cat([positions.mean(2), positions.std(2, correction=0)], dim=1)
