"""Resizing and blending adapters agree with dense SVDs in float64, and with PEFT where it has them."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from dense import best, close, delta
from torch import Tensor, nn

from vislora.errors import AdapterError
from vislora.lora import Adapter, Adapters, LowRankWeights
from vislora.lora.algebra import blend, resize

PARTIAL = ((0, 4), (8, 12))


def layer(rank: int = 3, alpha: float = 6.0, rows=None, rslora: bool = False, seed: int = 0) -> LowRankWeights:
    """A layer of 12 outputs and 10 inputs whose pairs have distinct singular values."""
    g = torch.Generator().manual_seed(seed)
    ranges = rows or ((0, 12),)
    height = sum(stop - start for start, stop in ranges)
    a = torch.randn(len(ranges) * rank, 10, generator=g)
    return LowRankWeights(a, torch.randn(height, rank, generator=g), rank, alpha, 12, rslora, rows)


def conv_layer(seed: int = 0) -> LowRankWeights:
    g = torch.Generator().manual_seed(seed)
    return LowRankWeights(torch.randn(4, 3, 3, 3, generator=g), torch.randn(6, 4, 1, 1, generator=g), 4, 8.0, 6)


# --- Resize -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [layer(), layer(rslora=True), conv_layer()], ids=["linear", "rslora", "conv"])
def test_a_smaller_rank_is_the_best_approximation(weights):
    done = resize(Adapter({"it": weights}), rank=2)
    small = done.adapter.layers["it"]
    wanted, share = best(delta(weights), 2)
    assert (small.rank, small.rslora) == (2, weights.rslora)
    assert small.lora_A.shape == (2, *weights.lora_A.shape[1:])
    assert small.scale == pytest.approx(weights.scale)
    assert close(delta(small), wanted)
    assert done.energy["it"] == pytest.approx(share, abs=1e-6)
    assert share < 0.97


def test_each_pair_of_a_partial_projection_is_cut_by_itself():
    weights = layer(rows=PARTIAL)
    done = resize(Adapter({"it": weights}), rank=1)
    small = done.adapter.layers["it"]
    dense = delta(weights)
    wanted = np.zeros_like(dense)
    for start, stop in PARTIAL:
        wanted[start:stop] = best(dense[start:stop], 1)[0]
    assert small.rows == PARTIAL
    assert close(delta(small), wanted)
    error = np.square(wanted - dense).sum() / np.square(dense).sum()
    assert done.energy["it"] == pytest.approx(1 - error, abs=1e-6)


def test_energy_chooses_the_smallest_rank_that_keeps_it():
    weights = layer(rank=5)
    shares = [best(delta(weights), r)[1] for r in range(1, 6)]
    for r in range(1, 5):
        threshold = (shares[r - 1] + shares[r]) / 2
        done = resize(Adapter({"it": weights}), energy=threshold)
        assert done.adapter.layers["it"].rank == r + 1
        assert done.energy["it"] == pytest.approx(shares[r], abs=1e-6)
    capped = resize(Adapter({"it": weights}), rank=2, energy=0.9999)
    assert capped.adapter.layers["it"].rank == 2
    assert capped.energy["it"] == pytest.approx(shares[1], abs=1e-6)


def test_energy_is_that_of_all_pairs_of_a_layer():
    weights = layer(rank=4, rows=PARTIAL)
    dense = delta(weights)
    for energy in (0.5, 0.7, 0.8, 0.9, 0.95):
        done = resize(Adapter({"it": weights}), energy=energy)
        small = done.adapter.layers["it"]
        kept = 1 - np.square(delta(small) - dense).sum() / np.square(dense).sum()
        assert done.energy["it"] == pytest.approx(kept, abs=1e-6)
        assert kept >= energy


@pytest.mark.parametrize("rows", [None, PARTIAL])
def test_a_larger_rank_changes_nothing_and_can_be_trained(rows):
    weights = layer(rows=rows)
    done = resize(Adapter({"it": weights}), rank=7)
    large = done.adapter.layers["it"]
    assert large.rank == 7
    assert large.scale == pytest.approx(weights.scale)
    assert close(delta(large), delta(weights))
    assert done.energy["it"] == pytest.approx(1.0)
    for fresh in large.lora_A.split(7):  # a zero row beside a zero column of B would never get a gradient
        assert (fresh.abs().amax(1) > 0.01).all()


@pytest.mark.parametrize("used", [0, 1], ids=["untrained", "of rank 1"])
def test_directions_that_carry_nothing_can_be_trained_afterwards(used):
    weights = layer(rank=4)
    weights.lora_B[:, used:] = 0.0
    sized = resize(Adapter({"it": weights}), rank=4).adapter.layers["it"]
    assert close(delta(sized), delta(weights)) or not used
    assert (sized.lora_A.abs().amax(1) > 1e-3).all()


def test_matrices_stay_on_their_device_where_another_is_the_default():
    weights = layer(rank=2)
    with torch.device("meta"):
        large = resize(Adapter({"it": weights}), rank=4).adapter.layers["it"]
    assert close(delta(large), delta(weights))


def test_resizing_keeps_everything_else():
    adapter = Adapter({"it": layer()}, {"head": {"weight": torch.ones(2, 3)}}, 0.1, {"classes": ["wren"]})
    small = resize(adapter, rank=1).adapter
    assert (small.trained, small.dropout, small.about) == (adapter.trained, adapter.dropout, adapter.about)


def test_an_untrained_layer_can_be_resized():
    weights = layer()
    untrained = LowRankWeights(weights.lora_A, torch.zeros_like(weights.lora_B), 3, 6.0, 12)
    for wish in ({"rank": 2}, {"energy": 0.9}):
        done = resize(Adapter({"it": untrained}), **wish)
        assert done.energy["it"] == 1.0
        assert not delta(done.adapter.layers["it"]).any()


@pytest.mark.parametrize("wish", [{}, {"rank": 0}, {"energy": 0.0}, {"energy": 1.2}])
def test_a_rank_or_energy_that_cannot_be_is_refused(wish):
    with pytest.raises(AdapterError, match="rank"):
        resize(Adapter({"it": layer()}), **wish)


def test_table_has_its_columns_below_each_other_however_short_the_names_are():
    lines = resize(Adapter({"fc": layer()}), rank=2).table().splitlines()
    assert [len(line) for line in lines] == [len(lines[0])] * 2


# --- Blend ------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).mean((2, 3)))


def peft_model(ranks: tuple[int, int]):
    """PEFT's model with adapters one (alpha 6) and two (alpha 5), and the same as values."""
    peft = pytest.importorskip("peft")
    model, values = None, []
    for name, rank, alpha in zip(("one", "two"), ranks, (6, 5), strict=True):
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["conv", "fc"], init_lora_weights=False)
        if model is None:
            model = peft.get_peft_model(Net(), config, name)
        else:
            model.add_adapter(name, config)
        layers = {}
        for path in ("conv", "fc"):
            low = model.base_model.model.get_submodule(path)
            a, b = low.lora_A[name].weight.detach(), low.lora_B[name].weight.detach()
            layers[path] = LowRankWeights(a, b, rank, alpha, b.shape[0])
        values.append(Adapter(layers))
    return model, values


@pytest.mark.parametrize("weights", [[0.7, 0.3], [1.0, -0.5]])
@pytest.mark.parametrize(("how", "ranks"), [("cat", (2, 3)), ("svd", (2, 3)), ("svd", (3, 3)), ("linear", (3, 3))])
def test_blend_is_what_peft_computes(how, ranks, weights):
    model, values = peft_model(ranks)
    model.add_weighted_adapter(["one", "two"], weights, "both", how)
    done = blend(values, weights, how)
    for path, weights_here in done.adapter.layers.items():
        theirs = model.base_model.model.get_submodule(path)
        assert weights_here.rank == theirs.r["both"]
        wanted = theirs.get_delta_weight("both").detach().flatten(1).numpy()
        assert close(delta(weights_here), wanted)
        if how == "linear":
            assert torch.allclose(weights_here.lora_A, theirs.lora_A["both"].weight, atol=1e-6)
            assert torch.allclose(weights_here.lora_B, theirs.lora_B["both"].weight, atol=1e-6)


def test_cat_is_the_exact_sum_and_the_others_say_how_near_they_are():
    one, other = Adapter({"it": layer(3, seed=1)}), Adapter({"it": layer(3, seed=2, rslora=True)})
    wanted = 0.7 * delta(one.layers["it"]) - 0.4 * delta(other.layers["it"])
    for how in ("cat", "svd", "linear"):
        done = blend([one, other], [0.7, -0.4], how)
        found = delta(done.adapter.layers["it"])
        missing = np.square(found - wanted).sum() / np.square(wanted).sum()
        assert done.energy["it"] == pytest.approx(1 - missing, abs=1e-5)
        assert (how == "cat") == close(found, wanted)
    assert blend([one, one], [0.5, 0.5], "linear").energy["it"] < 1  # products across adapters count twice


@pytest.mark.parametrize("how", ["cat", "svd"])
def test_layers_with_other_rows_and_layers_of_one_adapter_alone_are_blended(how):
    one = Adapter({"both": layer(2, rows=PARTIAL, seed=1), "mine": layer(2, seed=2)})
    other = Adapter({"both": layer(2, seed=3)})
    done = blend([one, other], [0.5, 2.0], how, rank=None if how == "cat" else 6)
    wanted = 0.5 * delta(one.layers["both"]) + 2.0 * delta(other.layers["both"])
    assert close(delta(done.adapter.layers["both"]), wanted)
    assert close(delta(done.adapter.layers["mine"]), 0.5 * delta(one.layers["mine"]))


def test_svd_fills_no_layer_up_beyond_the_rank_of_its_sum():
    one, other = Adapter({"both": layer(4, seed=1), "mine": layer(2, seed=2)}), Adapter({"both": layer(4, seed=3)})
    layers = blend([one, other], [0.5, 2.0], "svd").adapter.layers
    assert {name: (low.rank, low.lora_A.shape[0]) for name, low in layers.items()} == {"both": (4, 4), "mine": (2, 2)}


def test_matrix_of_one_adapter_is_the_1x1_convolution_of_another():
    flat, other = layer(2, seed=1), layer(2, seed=2)
    kernels = {"lora_A": flat.lora_A[..., None, None], "lora_B": flat.lora_B[..., None, None]}
    done = blend([Adapter({"it": replace(flat, **kernels)}), Adapter({"it": other})], [0.5, 2.0], "cat")
    assert done.adapter.layers["it"].lora_A.shape == (4, 10, 1, 1)
    assert close(delta(done.adapter.layers["it"]), 0.5 * delta(flat) + 2.0 * delta(other))


@pytest.mark.parametrize("how", ["cat", "svd", "linear"])
def test_adapters_over_the_same_rows_keep_them(how):
    one, other = Adapter({"it": layer(2, rows=PARTIAL, seed=1)}), Adapter({"it": layer(2, rows=PARTIAL, seed=2)})
    done = blend([one, other], [0.5, 0.5], how)
    assert done.adapter.layers["it"].rows == PARTIAL
    if how == "cat":
        assert close(delta(done.adapter.layers["it"]), 0.5 * (delta(one.layers["it"]) + delta(other.layers["it"])))


def test_heads_are_taken_from_one_adapter_never_blended():
    def with_head(seed: int, classes: int) -> Adapter:
        g = torch.Generator().manual_seed(seed)
        head = {"weight": torch.randn(classes, 10, generator=g)}
        return Adapter({"it": layer(seed=seed)}, {"head": head}, about={"classes": classes})

    one, other, bare = with_head(1, 3), with_head(2, 5), Adapter({"it": layer(seed=3)})
    with pytest.raises(AdapterError, match=r"different fully trained modules \(head\).*head=0"):
        blend([one, other], [0.5, 0.5])
    second = blend([one, other], [0.5, 0.5], head=1).adapter
    assert torch.equal(second.trained["head"]["weight"], other.trained["head"]["weight"])
    assert second.about == {"classes": 5}
    assert blend([bare, one], [0.5, 0.5]).adapter.trained == one.trained
    twin = copy.deepcopy(one)
    assert blend([one, twin], [0.5, 0.5]).adapter.about == {"classes": 3}
    with pytest.raises(AdapterError, match="head=2: there are 2 adapters"):
        blend([one, other], [0.5, 0.5], head=2)


def test_dora_is_resized_but_neither_weighted_nor_summed():
    weights = replace(layer(), magnitude=torch.rand(12))
    small = resize(Adapter({"it": weights}), rank=2).adapter.layers["it"]
    assert torch.equal(small.magnitude, weights.magnitude)
    assert close(delta(small), best(delta(weights), 2)[0])
    for others in ("it", "elsewhere"):
        with pytest.raises(AdapterError, match=r"it has a DoRA magnitude: .* with a weight of 1 beside"):
            blend([Adapter({"it": weights}), Adapter({others: layer()})], [1.0 if others == "it" else 0.5, 1.0])


@pytest.mark.parametrize("rows", [None, PARTIAL])
@pytest.mark.parametrize("how", ["cat", "svd", "linear"])
def test_dora_of_one_adapter_and_other_layers_of_another_act_together(how, rows):
    dora = Adapter({"0": replace(layer(rows=rows, seed=1), magnitude=torch.rand(12))})
    lora = Adapter({"1": layer(seed=2)})
    model = nn.Sequential(nn.Linear(10, 12), nn.Linear(10, 12))
    x, both = torch.randn(5, 10), copy.deepcopy(model)
    for one in (dora, lora):  # one after the other, each merged for good
        adapters = Adapters(both)
        adapters.load("it", one)
        adapters.merge_and_unload()
    Adapters(model).load("both", blend([dora, lora], [1.0, 1.0], how).adapter)
    for mine, wanted in zip(model, both, strict=True):
        torch.testing.assert_close(mine(x), wanted(x), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_blended_is_refused():
    one, other = Adapter({"it": layer(3)}), Adapter({"it": layer(2)})
    with pytest.raises(AdapterError, match=r"it has ranks \[3, 2\]"):
        blend([one, other], [0.5, 0.5], "linear")
    q, v = (Adapter({"it": layer(rows=(rows,))}) for rows in ((0, 4), (8, 12)))
    with pytest.raises(AdapterError, match=r"over rows \[\(\(0, 4\),\), \(\(8, 12\),\)\]"):
        blend([q, v], [0.5, 0.5], "linear")
    with pytest.raises(AdapterError, match="a number for each"):
        blend([one, other], [0.5])
    with pytest.raises(AdapterError, match="a number for each"):
        blend([one, other], [0.5, float("nan")])
    with pytest.raises(AdapterError, match="other models"):
        blend([one, Adapter({"it": conv_layer()})], [0.5, 0.5])
    with pytest.raises(AdapterError, match="choose linear, cat or svd"):
        blend([one, other], [0.5, 0.5], "ties")
    with pytest.raises(AdapterError, match="rank=2 belongs to how=svd"):
        blend([one, other], [0.5, 0.5], "cat", rank=2)
    with pytest.raises(AdapterError, match="rank=0, energy=None: expected a rank"):
        blend([one, other], [0.5, 0.5], rank=0)


@pytest.mark.parametrize("how", ["svd", "cat", "linear"])
def test_a_blend_has_the_biases_of_the_head_it_takes_and_the_larger_dropout(how):
    one, other = (
        Adapter({"it": layer(seed=i)}, dropout=dropout, biases={"it.bias": torch.full((4,), float(i))})
        for i, dropout in ((1, 0.1), (2, 0.3))
    )
    done = blend([one, other], [0.5, 0.5], how, head=1).adapter
    assert torch.equal(done.biases["it.bias"], other.biases["it.bias"])
    assert done.dropout == 0.3
    with pytest.raises(AdapterError, match=r"it\.bias.* can't be blended"):
        blend([one, other], [0.5, 0.5], how)
