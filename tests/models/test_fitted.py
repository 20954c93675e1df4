"""A pipeline's adapter gets the names and shapes of the models at hand."""

import pytest
import tiny_diffusion as tiny
import torch
from torch import nn

from vislora.errors import AdapterError
from vislora.lora import Adapter, LowRankWeights
from vislora.models.fitted import fitted

LAYER = "encoder.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("level", ["", "text_model."], ids=["flat", "as before transformers 5.6"])
def test_all_that_an_adapter_changes_in_a_text_encoder_is_called_as_the_model_has_it(level):
    model = tiny.clip()
    model = getattr(model, "text_model", model)
    models = nn.ModuleDict({"text_encoder": nn.ModuleDict({"text_model": model}) if level else model})
    in_files = "text_encoder.text_model."
    adapter = Adapter(
        {
            f"{in_files}{LAYER}": LowRankWeights(
                torch.ones(2, tiny.WIDTH), torch.ones(tiny.WIDTH, 2), 2, 2.0, tiny.WIDTH
            )
        },
        trained={f"{in_files}final_layer_norm": {"weight": torch.ones(tiny.WIDTH)}},
        biases={f"{in_files}{LAYER}.bias": torch.ones(tiny.WIDTH)},
    )
    found = fitted(adapter, models, "a pipeline")
    assert [*found.layers] == [f"text_encoder.{level}{LAYER}"]
    assert [*found.trained] == [f"text_encoder.{level}final_layer_norm"]
    assert [*found.biases] == [f"text_encoder.{level}{LAYER}.bias"]
    assert {*found.biases} <= {name for name, _ in models.named_parameters()}
    assert {*found.layers, *found.trained} <= {name for name, _ in models.named_modules()}


def test_layers_of_a_component_or_a_module_that_isnt_there_are_refused():
    low = LowRankWeights(torch.ones(2, 4), torch.ones(4, 2), 2, 2.0, 4)
    models = nn.ModuleDict({"unet": nn.ModuleDict({"conv_in": nn.Linear(4, 4)})})
    with pytest.raises(AdapterError, match="has layers for text_encoder, which a pipeline doesn't have"):
        fitted(Adapter({f"text_encoder.text_model.{LAYER}": low}), models, "a pipeline")
    with pytest.raises(AdapterError, match=r"belongs to another model: this pipeline has no module unet\.conv_out"):
        fitted(Adapter({"unet.conv_out": low}), models, "a pipeline")
