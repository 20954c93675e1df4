"""A timm model is adapted, or refused, before anything is trained."""

import pytest
import timm

from vislora.config.adapter import LoraAdapter
from vislora.errors import AdapterError
from vislora.tasks.recognition import adapt


def test_adapter_that_cannot_move_the_logits_is_refused():
    model = timm.create_model("test_vit", num_classes=2)
    model.blocks[1].attn.forward = lambda x, **_: x
    with pytest.raises(AdapterError, match=r"can't move the output: blocks\.1\.attn\.qkv"):
        adapt(model, LoraAdapter(rank=2))
