"""Which modules are trained in full, by kind and by name."""

import pytest
import timm
from torch import nn

from vislora.errors import AdapterError
from vislora.targets.trained import find_trained


def vit() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=48, num_heads=3, num_classes=5
    )


def test_norms_are_all_normalisation_layers_with_parameters():
    norms = ["blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm1", "blocks.1.norm2", "norm"]
    assert find_trained(vit(), ["norms"]) == norms
    resnet = timm.create_model("resnet10t", num_classes=5)
    expected = [name for name, module in resnet.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert find_trained(resnet, ["norms"]) == expected
    convnext = timm.create_model("convnext_atto", num_classes=5)
    expected = [name for name, module in convnext.named_modules() if isinstance(module, nn.LayerNorm)]
    assert find_trained(convnext, ["norms"]) == expected


def test_patterns_fit_the_end_of_a_name_between_dots():
    assert find_trained(vit(), ["fc1"]) == ["blocks.0.mlp.fc1", "blocks.1.mlp.fc1"]
    assert find_trained(vit(), [r"blocks\.1\.norm\d", "patch_embed"]) == [
        "patch_embed",
        "blocks.1.norm1",
        "blocks.1.norm2",
    ]
    with pytest.raises(AdapterError, match="no module with parameters that fits 'c1'"):
        find_trained(vit(), ["c1"])


def test_the_outermost_of_nested_modules_and_none_that_is_trained_anyway():
    assert find_trained(vit(), ["norms", r"blocks\.0"], besides=["head"]) == [
        "blocks.0",
        "blocks.1.norm1",
        "blocks.1.norm2",
        "norm",
    ]
    assert find_trained(vit(), ["head"], besides=["head"]) == []


def test_single_parameter_is_refused():
    with pytest.raises(AdapterError, match="pos_embed is a single parameter"):
        find_trained(vit(), ["pos_embed"])


@pytest.mark.parametrize(
    ("wanted", "other"),
    [("mlp2", r"parallel_blocks\.0\.mlp3"), (r"serial_blocks1\.0", "cpe1")],
    ids=["itself", "a part of it"],
)
def test_module_that_is_in_another_place_too_is_refused(wanted, other):
    coat = timm.create_model("coat_tiny", num_classes=5)
    with pytest.raises(AdapterError, match=rf"can't be trained in full: it has a module in common with {other},"):
        find_trained(coat, [wanted])


def test_module_that_is_twice_in_one_that_is_trained_is_trained_with_it():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = self.same = nn.Linear(2, 2)

    assert find_trained(nn.ModuleDict({"block": Twice(), "head": nn.Linear(2, 2)}), ["block"]) == ["block"]


def test_name_that_ends_another_ones_name_is_refused():
    swin = timm.create_model("swin_tiny_patch4_window7_224", num_classes=5)
    with pytest.raises(AdapterError, match=r"norm can't be trained in full without patch_embed\.norm"):
        find_trained(swin, ["norm(?<=^norm)"])


def test_head_whose_name_ends_another_ones_name_is_refused_until_both_are_chosen():
    model = timm.create_model("lowformer_b0", num_classes=5)
    with pytest.raises(
        AdapterError, match=r"classifier can't .* without pre_classifier.*adapter\.trained=\[norms,pre_cl"
    ):
        find_trained(model, ["norms"], besides=["classifier"])
    assert find_trained(model, ["pre_classifier"], besides=["classifier"]) == ["pre_classifier"]
