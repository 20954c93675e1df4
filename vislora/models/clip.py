"""How well pictures fit their texts, by a CLIP of transformers."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vislora.errors import ModelError
from vislora.hub import local_or_hub
from vislora.models.diffusion import quiet_imports
from vislora.models.whole import check_vocabulary, open_whole


class Clip:
    """A frozen CLIP with its tokenizer and image processor, its weights from safetensors alone.

    Args:
        name: a folder in transformers' layout, or a name on the hub.

    Raises:
        ModelError: it can't be opened, or is no CLIP.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        with quiet_imports():
            from transformers import CLIPModel, CLIPProcessor
        source = local_or_hub("clip", name)
        try:
            with quiet_imports():
                self._model = open_whole(CLIPModel, source).eval().to(device)
                self._processor = CLIPProcessor.from_pretrained(source)
            if Path(source).is_dir():
                check_vocabulary(type(self._processor.tokenizer), Path(source))
        except Exception as error:  # transformers documents no common class
            raise ModelError(f"clip={name} can't be opened: {' '.join(str(error).split())[:300]}") from error
        self._device = device

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """CLIPScore (Hessel et al. 2021, https://arxiv.org/abs/2104.08718) of each picture with its text: a hundred
        times the cosine of their embeddings, 0 where that is negative; float64 [N]."""
        scores = []
        for start in range(0, len(images), batch_size):
            inputs = self._processor(
                text=list(texts[start : start + batch_size]),
                images=list(images[start : start + batch_size]),
                return_tensors="pt",
                padding=True,
                truncation=True,
            ).to(self._device)
            found = self._model(**inputs)
            embeds = (found.image_embeds.cpu().double(), found.text_embeds.cpu().double())
            scores.append(F.cosine_similarity(*embeds))
        return 100 * torch.cat(scores).clamp_min(0)
