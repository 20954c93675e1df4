"""The Adapter value: one pair for many without loss, counting, comparing."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vislora.lora import Adapter, LowRankWeights

DIM, OUT, RANK = 10, 24, 3
SPLITS = {
    "q and v": ((0, 8), (16, 24)),
    "k": ((8, 16),),
    "q, k and v": ((0, 8), (8, 16), (16, 24)),
    "uneven": ((2, 5), (5, 17)),
}


def weights(rows=None, rslora: bool = False, alpha: float = 7.0, kernel: tuple[int, ...] = ()) -> LowRankWeights:
    generator = torch.Generator().manual_seed(0)
    pairs, height = (1, OUT) if rows is None else (len(rows), sum(stop - start for start, stop in rows))
    a = torch.randn(pairs * RANK, DIM, *kernel, generator=generator)
    b = torch.randn(height, RANK, *(1 for _ in kernel), generator=generator)
    return LowRankWeights(a, b, RANK, alpha, OUT, rslora, rows)


def update(w: LowRankWeights) -> Tensor:
    """s * B A over all rows in float64, row range by row range."""
    s = w.alpha / (math.sqrt(w.rank) if w.rslora else w.rank)
    a, b = w.lora_A.double().flatten(1), w.lora_B.double().flatten(1)
    total, offset = torch.zeros(w.out, a.shape[1], dtype=torch.double), 0
    for i, (start, stop) in enumerate(w.rows or ((0, w.out),)):
        total[start:stop] = s * b[offset : offset + stop - start] @ a[i * w.rank : (i + 1) * w.rank]
        offset += stop - start
    return total


@pytest.mark.parametrize("kernel", [(), (3, 3)], ids=["linear", "conv"])
@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("rows", SPLITS.values(), ids=SPLITS.keys())
def test_one_pair_holds_the_same_update_as_the_pairs_it_came_from(rows, rslora, kernel):
    split = weights(rows, rslora, kernel=kernel)
    one = split.as_one_pair()
    assert one.rows is None
    assert one.rank == len(rows) * RANK
    assert one.lora_A.shape == (one.rank, DIM, *kernel)
    assert one.lora_B.shape == (OUT, one.rank, *(1 for _ in kernel))
    assert one.rslora == rslora
    assert torch.equal(one.lora_A, split.lora_A)
    assert torch.allclose(update(one), update(split), rtol=1e-12, atol=0)
    assert update(split).any()


def test_one_pair_over_all_rows_is_itself():
    whole = weights()
    assert whole.as_one_pair() is whole


@pytest.mark.parametrize(
    ("rslora", "alpha", "scale"), [(False, 1.0, 1 / 3), (True, 1.0, 1 / math.sqrt(3)), (False, 7.0, 7 / 3)]
)
def test_scale_is_not_rounded(rslora, alpha, scale):
    assert weights(rslora=rslora, alpha=alpha).scale == pytest.approx(scale, rel=1e-15)


def test_equal_adapters_have_the_same_layers_settings_and_bits():
    def adapter(layer: LowRankWeights, name: str = "o", head: float = 0.0) -> Adapter:
        return Adapter({name: layer}, {"head": {"weight": torch.full((2, 2), head)}})

    mine = adapter(weights())
    assert mine.equals(adapter(weights()))
    assert mine.equals(Adapter(mine.layers, mine.trained, 0.3, {"classes": ["wren"]}))
    assert not mine.equals(adapter(weights(), name="qkv"))
    assert not mine.equals(adapter(weights(), head=1.0))
    assert not mine.equals(adapter(weights(alpha=7.5)))
    assert not mine.equals(adapter(weights(rslora=True)))
    assert not mine.equals(adapter(weights(((0, 24),))))
    assert not mine.equals(Adapter(mine.layers, {}))
    assert not mine.equals(Adapter(mine.layers, {"head": {"bias": torch.zeros(2)}}))
    for key in ("lora_A", "lora_B"):
        changed = weights()
        getattr(changed, key)[1, 2] += 1e-6
        assert not mine.equals(adapter(changed))
    ones, others = (replace(weights(), magnitude=torch.full((24,), length)) for length in (1.0, 2.0))
    assert adapter(ones).equals(adapter(ones))
    assert not adapter(ones).equals(adapter(others))
    assert not adapter(ones).equals(mine)


def test_equal_adapters_have_the_same_biases():
    mine, same, other = (Adapter({"o": weights()}, biases={"o.bias": torch.full((24,), v)}) for v in (1.0, 1.0, 2.0))
    assert mine.equals(same)
    assert not mine.equals(other)
    assert not mine.equals(Adapter(mine.layers))
