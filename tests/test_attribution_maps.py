"""What is drawn of a classifier's attention."""

from types import SimpleNamespace

import pytest
import timm
import torch
from PIL import Image

from vislora.attribution_maps import _maps, draw_maps
from vislora.lora import Adapters, LoraSettings
from vislora.models.vit import preprocessing
from vislora.recognizer import Recognizer
from vislora.targets.timm import find_targets


def test_what_a_single_pixel_says_is_spread_as_a_gaussian():
    def says(images):
        return torch.stack([2.0 * images[:, :, 40, 30].sum(1), images.sum((1, 2, 3))], 1)

    maps = _maps(SimpleNamespace(model=says), torch.ones(1, 3, 64, 64), torch.tensor([0]))
    sigma = 64 / 32
    apart = torch.stack(torch.meshgrid(torch.arange(64.0) - 40, torch.arange(64.0) - 30, indexing="ij"))
    bell = torch.exp(-apart.square().sum(0) / (2 * sigma**2)) / (2 * torch.pi * sigma**2)
    torch.testing.assert_close(maps[0], 6.0 * bell, rtol=0.01, atol=1e-3)
    assert maps.sum().item() == pytest.approx(6.0, rel=1e-4)


def test_maps_of_many_pictures_need_the_memory_of_a_few():
    sizes = []

    def says(images):
        sizes.append(len(images))
        return (images * images).mean((1, 2, 3))[:, None] * torch.tensor([1.0, -1.0])

    images, classes = torch.randn(19, 3, 32, 32), torch.arange(19) % 2
    maps = _maps(SimpleNamespace(model=says), images, classes)
    assert max(sizes) == 8
    alone = [_maps(SimpleNamespace(model=says), images[i : i + 1], classes[i : i + 1]) for i in range(19)]
    torch.testing.assert_close(maps, torch.cat(alone))


def test_under_each_map_is_its_class_and_the_probability_of_what_was_predicted(monkeypatch):
    monkeypatch.setattr("vislora.attribution_maps.contact_sheet", lambda tiles, columns: [tile.lines for tile in tiles])
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=24, num_heads=2, num_classes=2)
    adapters = Adapters(model.eval())
    adapters.add("it", find_targets(model, ["q"]), LoraSettings(2, 4), trained=["head"])
    model.head.bias.data += torch.tensor([0.0, 9.0])
    recognizer = Recognizer(model, preprocessing(model), ("wren", "jay"), {}, adapters)
    lines = draw_maps(recognizer, [("a wren", Image.new("RGB", (32, 32)))], torch.device("cpu"))
    assert lines == [("a wren",), ("base: jay",), ("adapted: jay", "100%")]
