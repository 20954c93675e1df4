"""What the rest of torch does with adapted layers: torch.func, torch.export, torch.compile, FSDP, autocast."""

import copy

import pytest
import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_module
from torch.func import functional_call, grad, jvp, vmap

from vislora.errors import AdapterError
from vislora.lora import Adapters, LoraSettings, TargetLayer, frozen_weight, prove_alive
from vislora.targets.timm import find_targets

KINDS = {
    "lora": {},
    "rank 1": {"rank": 1},  # for which a Linear of 24 x 24 isn't narrow
    "dora": {"dora": True},
    "rows": {"rows": ((0, 8), (16, 24))},
}


def adapted(rows=None, dtype=torch.float32, rank=3, **settings) -> nn.Sequential:
    """A Linear of 24 outputs and a 3x3 convolution over its output, with random adapters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24), nn.Unflatten(-1, (6, 2, 2)), nn.Conv2d(6, 4, 3, padding=1), nn.Flatten())
    model.to(dtype)
    Adapters(model).add("it", [TargetLayer("0", rows), TargetLayer("2")], LoraSettings(rank, 2.0 * rank, **settings))
    for name, p in model.named_parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3) if "lora_" in name else nn.init.uniform_(p, 0.5, 1.5)
    return model


def written_out(model: nn.Module, x: Tensor) -> Tensor:
    """The formula in stock operators: W0 + s B A, with DoRA its rows at their magnitudes."""
    weights = []
    for layer in (model[0], model[2]):
        low, w = layer.lora, frozen_weight(layer)
        update, at = torch.zeros_like(w).flatten(1), 0
        for i, (start, stop) in enumerate(low.rows):
            a, b = low.lora_A.split(low.rank)[i].flatten(1), low.lora_B[at : at + stop - start].flatten(1)
            update = update + nn.functional.pad(2.0 * b @ a, (0, 0, start, len(w) - stop))
            at += stop - start
        w = w.flatten(1) + update
        if low.magnitude is not None:
            w = low.magnitude[:, None] * w / w.detach().norm(dim=1, keepdim=True)
        weights.append(w.view(frozen_weight(layer).shape))
    h = nn.functional.linear(x, weights[0], model[0].bias).unflatten(-1, (6, 2, 2))
    return nn.functional.conv2d(h, weights[1], model[2].bias, padding=1).flatten(1)


@pytest.mark.parametrize("rows", [1, 200], ids=["short", "long"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_gradients_of_each_sample_are_those_of_the_samples_alone(kind, rows):
    model = adapted(**kind)
    x = torch.randn(3, rows, 24)
    own = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters, sample):
        return functional_call(model, parameters, (sample,)).square().sum()

    found = vmap(grad(loss), (None, 0))(own, x)
    for i, sample in enumerate(x):
        alone = torch.autograd.grad(
            written_out(model, sample).square().sum(), [p for p in model.parameters() if p.requires_grad]
        )
        for (name, gradients), wanted in zip(found.items(), alone, strict=True):
            torch.testing.assert_close(gradients[i], wanted, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("rows", [1, 200], ids=["short", "long"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_forward_mode_derivative_is_that_of_the_formula(kind, rows):
    model, x, v = adapted(**kind), torch.randn(rows, 24), torch.randn(rows, 24)
    (y, along), (wanted, wanted_along) = jvp(model, (x,), (v,)), jvp(lambda x: written_out(model, x), (x,), (v,))
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(along, wanted_along, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_exported_program_takes_any_number_of_samples(kind):
    wide = nn.Sequential(nn.Linear(512, 512))  # for which few samples and many are computed in other ways
    Adapters(wide).add("it", [TargetLayer("0")], LoraSettings(3, 6.0, dora="dora" in kind))
    nn.init.normal_(wide[0].lora.lora_B)
    for model, width in ((adapted(**kind), 24), (wide, 512)):
        batch = torch.export.Dim("batch", min=2, max=4096)
        program = torch.export.export(model.eval(), (torch.randn(3, width),), dynamic_shapes=({0: batch},)).module()
        for count in (2, 1000):
            x = torch.randn(count, width)
            torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-4)


def test_dropout_is_part_of_one_compiled_graph():
    torch._dynamo.reset()
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64))
    Adapters(model).add("it", [TargetLayer("1")], LoraSettings(4, 8.0, dropout=0.5))
    nn.init.normal_(model[1].lora.lora_B)
    x, compiled = torch.randn(500, 64), torch.compile(model, backend="aot_eager", fullgraph=True)
    drawn = torch.stack([compiled(x) for _ in range(200)])
    assert not torch.equal(drawn[0], drawn[1])
    offset = (drawn.mean(0) - model.eval()(x)) / drawn.std(0) * 200**0.5  # in standard errors
    assert offset.abs().mean().item() == pytest.approx((2 / torch.pi) ** 0.5, abs=0.1)


def test_float64_stays_float64_under_autocast():
    for rows in (1, 200):
        model, x = adapted(dtype=torch.float64), torch.randn(rows, 24, dtype=torch.float64)
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        assert y.dtype == torch.float64
        torch.testing.assert_close(y, written_out(model.double(), x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layer", [0, 2], ids=["linear", "conv"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_weight_beside_an_adapter_that_wants_a_gradient_is_refused(kind, layer):
    for rows in (1, 200):
        model, x = adapted(**kind), torch.randn(rows, 24)
        frozen_weight(model[layer]).requires_grad_(True)
        with pytest.raises(AdapterError, match="weight of an adapted layer requires a gradient, which isn't computed"):
            model(x)
        with torch.no_grad():
            model(x)


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", [{}, {"dora": True}, {"pissa": True}], ids=["lora", "dora", "pissa"])
@pytest.mark.parametrize(("name", "size"), [("vit_tiny_patch16_224", 32), ("eva02_tiny_patch14_224", 28)])
def test_sharded_model_has_the_same_output_and_gradients(name, size, kind, mesh):
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=size, depth=2, num_classes=5).eval()
    targets = find_targets(model, ["q", "v", "o"])
    adapters = Adapters(model)
    adapters.add("it", targets, LoraSettings(4, 8.0, **kind), trained=["head"])
    for layer in (model.get_submodule(target.name) for target in targets):
        nn.init.normal_(layer.lora.lora_B, std=0.1)
    (whole, its_adapters), x = copy.deepcopy((model, adapters)), torch.randn(2, 3, size, size)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    y, wanted = model(x), whole(x)
    torch.testing.assert_close(y, wanted)
    y.square().sum().backward()
    wanted.square().sum().backward()
    expected = {name: p.grad for name, p in whole.named_parameters() if p.requires_grad}
    assert len(expected) > 4
    for parameter, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad.full_tensor(), expected[parameter])
    assert adapters.adapter("it").equals(its_adapters.adapter("it"))
    with pytest.raises(AdapterError, match="is sharded, and shards can't be merged; merge in a whole model"):
        adapters.merge()
    with pytest.raises(AdapterError, match="of a sharded model they are gathered elsewhere; prove it before"):
        prove_alive(model, lambda: model(x))
    torch.testing.assert_close(model(x), wanted)


def test_layer_sharded_by_itself_gives_its_adapter_and_is_refused_where_its_class_would_change(mesh):
    model = nn.Sequential(nn.Linear(8, 8))
    adapters = Adapters(model)
    adapters.add("it", [TargetLayer("0")], LoraSettings(2, 4.0))
    wanted = adapters.adapter("it")
    fully_shard(model[0], mesh=mesh)
    assert adapters.adapter("it").equals(wanted)
    with pytest.raises(
        AdapterError, match="0 has become a FSDPLoraLinear, as fully_shard makes it of a layer by itself"
    ):
        adapters.remove("it")


def test_weight_sharded_otherwise_is_refused_where_it_is_read(mesh):
    layer = nn.Linear(8, 8)
    Adapters(nn.Sequential(layer)).add("it", [TargetLayer("0")], LoraSettings(2, 4.0))
    distribute_module(layer, mesh)
    with pytest.raises(AdapterError, match="the weight of a LoraLinear is sharded"):
        nn.functional.linear(torch.randn(3, 8), layer.weight)
