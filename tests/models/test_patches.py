"""In training a ViT is shown some patches of each picture, which the batch names."""

import pytest
import timm
import torch
import torch.nn.functional as F

from vislora.errors import ConfigError
from vislora.models.patches import ShownPatches
from vislora.objectives.recognition import Recognition

MODELS = {
    "vit_tiny_patch16_224": {"img_size": 64},
    "vit_tiny_patch16_224.registers": {"img_size": 64, "reg_tokens": 3, "class_token": False, "global_pool": "avg"},
    "eva02_tiny_patch14_224": {"img_size": 56},
    "vit_small_patch16_rope_mixed_224": {"img_size": 64, "embed_dim": 96, "depth": 2},  # an Eva, rotated in each block
}


def built(name, **more):
    torch.manual_seed(0)
    return timm.create_model(name.partition(".")[0], num_classes=5, **MODELS[name] | more)


def pictures(model, count=3):
    return torch.randn(count, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
def test_the_logits_are_those_of_timms_patchdropout_for_the_same_patches(name):
    own, theirs = built(name), built(name, patch_drop_rate=0.4)
    theirs.load_state_dict(own.state_dict())
    shown, images = ShownPatches(own.train(), 0.4), pictures(own)
    assert shown.total == (images.shape[-1] // own.patch_embed.patch_size[0]) ** 2
    torch.manual_seed(5)
    wanted = theirs.train()(images)
    torch.manual_seed(5)
    chosen = torch.randn(len(images), shown.total).argsort(-1)[:, : int(shown.total * 0.6)]
    with shown.showing(chosen):
        torch.testing.assert_close(own(images), wanted)


def test_the_second_token_of_a_distilled_model_is_always_kept():
    """timm's own PatchDropout is made before the model has it, and counts it among the patches."""
    model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=64)
    shown, tokens = ShownPatches(model, 0.5), torch.randn(1, 2 + 16, 192)
    with shown.showing(torch.arange(15, 7, -1)[None]):
        assert torch.equal(model.patch_drop(tokens), torch.cat((tokens[:, :2], tokens[:, 10:].flip(1)), dim=1))


@pytest.mark.parametrize("name", MODELS)
def test_every_patch_is_seen_where_none_are_named(name):
    plain, model = built(name), built(name)
    shown, images = ShownPatches(model, 0.5), pictures(model)
    for mode in (True, False):
        assert torch.equal(model.train(mode)(images), plain.train(mode)(images))
    with pytest.raises(ZeroDivisionError), shown.showing(torch.zeros(3, shown.kept, dtype=torch.long)):
        raise ZeroDivisionError
    assert torch.equal(model(images), plain(images))


def test_a_step_learns_from_the_patches_of_the_batch_and_no_others():
    model = built("vit_tiny_patch16_224")
    shown = ShownPatches(model.train(), 0.75)
    images = pictures(model, count=2).requires_grad_()
    chosen = torch.tensor([[0, 3, 6, 9], [15, 1, 2, 8]])
    assert (shown.kept, shown.total) == (4, 16)
    labels = torch.tensor([1, 4])
    losses = Recognition(0.1, shown).losses(model, (images, labels, chosen))
    with shown.showing(chosen):
        expected = F.cross_entropy(model(images), labels, reduction="none", label_smoothing=0.1)
    assert torch.equal(losses, expected)
    losses.sum().backward()
    moved = F.max_pool2d(images.grad.abs().amax(1), 16).flatten(1) > 0
    assert [row.nonzero().flatten().tolist() for row in moved] == [sorted(row) for row in chosen.tolist()]


@pytest.mark.parametrize(("share", "kept"), [(0.04, 15), (0.25, 12), (0.5, 8), (0.99, 1)])
def test_the_share_is_of_the_patches_and_one_is_always_left(share, kept):
    assert ShownPatches(built("vit_tiny_patch16_224"), share).kept == kept


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "samvit_base_patch16_224", "resnet18"])
def test_a_model_that_needs_all_of_its_patches_is_refused(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(ConfigError, match=rf"data.augment.patch_drop=0.5: .*{type(model).__name__}"):
        ShownPatches(model, 0.5)


def test_a_share_of_less_than_half_a_patch_is_refused():
    with pytest.raises(ConfigError, match=r"patch_drop=0\.001 is less than half of one of the \d+ patches"):
        ShownPatches(built("vit_tiny_patch16_224"), 0.001)


def test_a_model_that_drops_patches_by_itself_is_refused():
    with pytest.raises(ConfigError, match=r"model.args.patch_drop_rate, not both"):
        ShownPatches(built("vit_tiny_patch16_224", patch_drop_rate=0.2), 0.5)
