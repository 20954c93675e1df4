"""PatchDropout: in training a ViT sees but some of each picture's patches, for less work and less overfitting."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vislora.errors import ConfigError


class ShownPatches(nn.Module):
    """PatchDropout (Liu et al. 2022, https://arxiv.org/abs/2208.07220), told by the batch which patches to keep.

    It takes the place of the model's own `patch_drop`, whose random numbers are those of a process: here they are each
    sample's, and several processes train as one does.

    Attributes:
        kept, total: patches of a picture that training shows, of how many.
    """

    def __init__(self, model: nn.Module, share: float) -> None:
        """
        Args:
            model: a timm model, which is changed.
            share: of the patches, left out.

        Raises:
            ConfigError: a model whose patches can't be left out, or one that leaves some out by itself; a share of
                less than half a patch.
        """
        super().__init__()
        if not isinstance(model, VisionTransformer | Eva):
            raise ConfigError(
                f"data.augment.patch_drop={share:g}: a {type(model).__name__} needs all of its patches, plain ViTs and "
                "EVA don't; give data.augment.patch_drop=0, also where a recipe has set it"
            )
        if getattr(model.patch_drop, "prob", 0.0):
            raise ConfigError("give data.augment.patch_drop or model.args.patch_drop_rate, not both")
        self.total = model.patch_embed.num_patches
        self.kept = max(1, round((1.0 - share) * self.total))
        if self.kept == self.total:
            raise ConfigError(
                f"data.augment.patch_drop={share:g} is less than half of one of the {self.total} patches, and leaves "
                "none out; raise it, or give 0"
            )
        self._prefix = model.num_prefix_tokens  # class and register tokens, all kept
        self._answers_indices = isinstance(model, Eva)  # which chooses the rotary embeddings by them
        self._chosen: Tensor | None = None
        model.patch_drop = self

    @contextmanager
    def showing(self, chosen: Tensor) -> Iterator[None]:
        """Meanwhile the model sees these patches alone, numbers [B, kept] for its B pictures."""
        self._chosen = chosen
        try:
            yield
        finally:
            self._chosen = None

    def forward(self, tokens: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        """Tokens [B, prefix + total, D] -> [B, prefix + kept, D]."""
        if self._chosen is not None:
            rows = self._chosen.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
            prefix, patches = tokens[:, : self._prefix], tokens[:, self._prefix :]
            tokens = torch.cat((prefix, patches.gather(1, rows)), dim=1)
        return (tokens, self._chosen) if self._answers_indices else tokens
