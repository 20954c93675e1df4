"""A model that starts from its prefix's features is the model that starts from the pictures, or it is refused."""

import pytest
import timm
import torch
from torch import Tensor, nn

from vislora.errors import ConfigError, ModelError
from vislora.models.prefix import Prefix

FAMILIES = {
    "class token": ("vit_tiny_patch16_224", {"img_size": 32, "embed_dim": 48, "num_heads": 3}),
    "rotary": ("eva02_tiny_patch14_224", {"img_size": 28, "embed_dim": 48, "num_heads": 3}),
    "shared bias": (
        "beit_base_patch16_224",
        {"img_size": 32, "embed_dim": 48, "num_heads": 3, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},
    ),
    "BatchNorm": ("xcit_nano_12_p16_224", {"img_size": 32, "embed_dim": 48}),
    "gated head": ("deit3_small_patch16_224", {"img_size": 32, "embed_dim": 48, "num_heads": 3}),
}


def frozen(name: str, args: dict, trained: tuple[str, ...] = ("blocks.2", "blocks.3", "head")) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, depth=4, num_classes=5, **args).eval()
    for path, p in model.named_parameters():
        p.requires_grad_(path.startswith(trained))
        if not p.any():  # gammas and biases that start at zero would hide a difference
            nn.init.normal_(p, std=0.1)
    return model


def images_for(args: dict) -> Tensor:
    return torch.randn(3, 3, args["img_size"], args["img_size"], generator=torch.Generator().manual_seed(1))


def loss_and_grads(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    logits = model(x)
    return logits, torch.autograd.grad(logits.square().sum(), [p for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_from_features_are_those_from_pictures_bit_for_bit(family):
    name, args = FAMILIES[family]
    model, images = frozen(name, args), images_for(args)
    wanted, wanted_grads = loss_and_grads(model, images)
    prefix = Prefix(model, images)
    assert (prefix.count, prefix.total) == (2, 4)
    features = prefix.features(images)
    assert (features.shape[1:], features.dtype) == (prefix.shape, prefix.dtype)
    with prefix.skipped(images.shape[1:]):
        found, grads = loss_and_grads(model, features)
        other = model(features[:1])
    assert torch.equal(found, wanted)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(grads, wanted_grads, strict=True))
    assert torch.allclose(other, wanted[:1], atol=1e-5)
    assert torch.equal(model(images), wanted)  # and it is itself again


def test_frozen_blocks_are_not_computed_from_features():
    name, args = FAMILIES["class token"]
    model, images = frozen(name, args), images_for(args)
    prefix = Prefix(model, images)
    features, called = prefix.features(images), []
    for i, block in enumerate(model.blocks):
        block.attn.register_forward_hook(lambda *_, i=i: called.append(i))
    with prefix.skipped(images.shape[1:]):
        model(features)
    assert called == [2, 3]
    called.clear()
    prefix.features(images)
    assert called == [0, 1]


def test_a_probe_starts_after_the_last_block():
    name, args = FAMILIES["class token"]
    model, images = frozen(name, args, ("head",)), images_for(args)
    prefix = Prefix(model, images)
    assert prefix.count == 4
    features = prefix.features(images)
    wanted = model(images)
    with prefix.skipped(images.shape[1:]):
        assert torch.equal(model(features), wanted)


def test_the_key_is_of_the_frozen_weights_alone():
    name, args = FAMILIES["class token"]
    model, images = frozen(name, args), images_for(args)
    key = Prefix(model, images).key("fp32")
    with torch.no_grad():
        model.head.weight.add_(1)
        model.blocks[3].mlp.fc1.bias.add_(1)
    assert Prefix(model, images).key("fp32") == key
    assert Prefix(model, images).key("bf16") != key
    with torch.no_grad():
        model.pos_embed[0, 0, 0] += 1e-6
    assert Prefix(model, images).key("fp32") != key


def test_frozen_weights_after_the_cut_are_no_part_of_the_key():
    name, args = FAMILIES["class token"]
    model, images = frozen(name, args), images_for(args)
    model.blocks[3].mlp.requires_grad_(False)
    key = Prefix(model, images).key("fp32")
    with torch.no_grad():
        model.blocks[3].mlp.fc1.weight.add_(1)
    assert Prefix(model, images).key("fp32") == key


def test_what_is_random_after_the_cut_is_no_hindrance():
    name, args = FAMILIES["class token"]
    assert Prefix(frozen(name, args | {"drop_rate": 0.1}), images_for(args)).count == 2


class LooksBack(nn.Module):
    """A trunk of blocks whose head sees the picture once more."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.head = nn.Linear(8, 2)
        self.blocks[0].requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        tokens = images.flatten(1)[:, :8]
        return self.head(self.blocks(tokens) + tokens)


def test_what_cannot_be_cut_is_refused_with_its_name():
    name, args = FAMILIES["class token"]
    images = images_for(args)
    with pytest.raises(ConfigError, match="the first block is trained"):
        Prefix(frozen(name, args, ("blocks", "head")), images)
    with pytest.raises(ConfigError, match="pos_embed is trained and comes before block 3"):
        Prefix(frozen(name, args, ("pos_embed", "blocks.3", "head")), images)
    with pytest.raises(ConfigError, match=r"blocks.1.drop_path1 \(DropPath\) draws random numbers.*model.drop_path"):
        Prefix(frozen(name, args | {"drop_path_rate": 0.1}), images)
    with pytest.raises(ConfigError, match=r"attn_drop \(Dropout\) draws random numbers"):
        Prefix(frozen(name, args | {"attn_drop_rate": 0.1}), images)
    with pytest.raises(ConfigError, match=r"patch_drop \(PatchDropout\) draws random numbers"):
        Prefix(frozen(name, args | {"patch_drop_rate": 0.5}), images)
    model = frozen(*FAMILIES["BatchNorm"])
    model.blocks[1].local_mp.bn = nn.BatchNorm2d(48, track_running_stats=False).requires_grad_(False).eval()
    with pytest.raises(ConfigError, match=r"blocks\.1\.local_mp\.bn .*BatchNorm2d.* statistics of each batch"):
        Prefix(model, images)
    with pytest.raises(ModelError, match="ResNet has no sequence of blocks"):
        Prefix(timm.create_model("resnet10t", num_classes=2).eval(), images)
    with pytest.raises(ModelError, match="LooksBack uses more of a picture than what reaches block 1"):
        Prefix(LooksBack(), images)
