"""Integrated gradients keep what their axioms promise."""

import pytest
import timm
import torch

from vislora.metrics.attribution import integrated_gradients


def test_a_linear_model_is_attributed_in_closed_form():
    weight = torch.randn(4, 3, 5, 5)
    images, classes = torch.randn(2, 3, 5, 5), torch.tensor([3, 1])
    maps = integrated_gradients(lambda x: torch.einsum("bchw,kchw->bk", x, weight), images, classes, steps=1)
    torch.testing.assert_close(maps, (images * weight[classes]).sum(1))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "resnet18"])
def test_maps_add_up_to_what_the_image_adds_to_the_logit(name):
    small = {"img_size": 64, "depth": 2} if name.startswith("vit") else {}
    if name.startswith("swin"):
        small = {"img_size": 56, "depths": (1, 1), "embed_dim": 24, "num_heads": (1, 2)}
    model = timm.create_model(name, num_classes=4, **small).eval().requires_grad_(False).double()
    torch.nn.init.normal_(model.get_classifier().weight)  # a fresh head says hardly anything
    images = torch.randn(2, 3, *[small.get("img_size", 64)] * 2, dtype=torch.float64)
    classes = torch.tensor([2, 0])
    maps = integrated_gradients(model, images, classes, steps=64)
    with torch.no_grad():
        gain = (model(images) - model(torch.zeros_like(images))).gather(1, classes[:, None])[:, 0]
    assert gain.abs().min() > 0.1
    torch.testing.assert_close(maps.sum((1, 2)), gain, rtol=0.02, atol=0.02)
