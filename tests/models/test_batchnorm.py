"""BatchNorm that is trained gets passes of as many pictures as it needs."""

import pytest
import timm
import torch

from vislora.config.adapter import FullAdapter, LoraAdapter
from vislora.data.order import Order
from vislora.errors import ConfigError
from vislora.models.batchnorm import check_passes
from vislora.tasks.recognition import adapt

LEVIT = {"embed_dim": [16, 24, 32], "num_heads": [2, 2, 2], "depth": [1, 1, 1], "key_dim": 8}
PICTURE = torch.zeros(1, 3, 64, 64)


def levit():
    return timm.create_model("levit_128s", img_size=64, num_classes=3, **LEVIT).eval()


@pytest.mark.parametrize("adapter", [FullAdapter(), LoraAdapter(rank=2, trained=["norms"])], ids=["full", "norms"])
@pytest.mark.parametrize("order", [Order(19, 2, 0), Order(16, 4, 0, accumulation=4)], ids=["rest", "passes"])
def test_single_pictures_are_refused_where_batchnorm_sees_one_number_of_each(adapter, order):
    model = levit()
    adapt(model, adapter)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model.train()(torch.randn(1, 3, 64, 64))
    with pytest.raises(ConfigError, match=r"\.bn is a BatchNorm that is trained.* leaves some with one; use larger"):
        check_passes(model.eval(), order, PICTURE)
    check_passes(model, Order(19, 4, 0), PICTURE)


def test_single_pictures_are_enough_for_a_frozen_batchnorm_and_for_maps_of_several_numbers():
    model = levit()
    adapt(model, LoraAdapter(rank=2))
    check_passes(model, Order(16, 1, 0), PICTURE)
    maps = timm.create_model("resnet10t", num_classes=3).eval()
    check_passes(maps, Order(16, 1, 0), PICTURE)
    maps.train()(torch.randn(1, 3, 64, 64))
