"""What pictures go through, against Pillow and timm."""

import colorsys

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from vislora.config.data import AugmentConfig
from vislora.data.transforms import Preprocessing, eval_transform, train_transform
from vislora.errors import ConfigError

P = Preprocessing(32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic", 0.875)


def picture(width=50, height=40):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_validation_sees_what_timm_shows():
    theirs = create_transform(32, interpolation="bicubic", mean=P.mean, std=P.std, crop_pct=P.crop_pct)
    torch.testing.assert_close(eval_transform(P)(picture()), theirs(picture()), rtol=0, atol=1e-5)


def test_a_picture_of_the_right_size_is_only_normalised():
    p = Preprocessing(32, (0.5,) * 3, (0.25,) * 3)
    image = picture(32, 32)
    expected = (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - 0.5) / 0.25
    torch.testing.assert_close(eval_transform(p)(image), expected)
    plain = AugmentConfig(hflip=0.0)
    torch.testing.assert_close(train_transform(p, plain)(image), expected)


def test_without_augmentation_training_sees_what_validation_does():
    plain = train_transform(P, AugmentConfig(hflip=0.0))
    torch.testing.assert_close(plain(picture()), eval_transform(P)(picture()))


def test_every_augmentation_acts_and_keeps_shape_and_type():
    p = Preprocessing(32, (0.5,) * 3, (0.25,) * 3)
    plain = train_transform(p, AugmentConfig(hflip=0.0))(picture())
    for augment in (
        AugmentConfig(hflip=1.0),
        AugmentConfig(hflip=0.0, crop_scale=0.2),
        AugmentConfig(hflip=0.0, color_jitter=0.5),
        AugmentConfig(hflip=0.0, rotate=30.0),
        AugmentConfig(hflip=0.0, erase=1.0),
    ):
        changed = train_transform(p, augment)(picture())
        assert changed.shape == (3, 32, 32)
        assert changed.dtype == torch.float32
        assert not torch.equal(changed, plain)
    assert torch.equal(train_transform(p, AugmentConfig(hflip=1.0))(picture()), plain.flip(2))


def test_a_random_crop_has_the_least_share_that_is_set_and_is_resized_as_the_model_wants():
    p = Preprocessing(32, (0.5,) * 3, (0.5,) * 3, "nearest")
    places = np.stack(np.meshgrid(*[np.linspace(0, 255, 200)] * 2), axis=-1).astype(np.uint8)  # of columns and rows
    noise = np.random.default_rng(0).integers(0, 2, (200, 200, 1), np.uint8) * 255
    crop = train_transform(p, AugmentConfig(hflip=0.0, crop_scale=0.5))
    shares = []
    for _ in range(100):
        x, y, either = crop(Image.fromarray(np.concatenate([places, noise], axis=-1)))
        shares.append((x.max() - x.min()).item() / 2 * (y.max() - y.min()).item() / 2)
        assert either.unique().tolist() == [-1.0, 1.0]
    assert 0.4 < min(shares) < 0.6  # the nearest of the cut's outermost pixels are some way within
    assert max(shares) > 0.8


def test_colours_change_by_a_quarter_of_what_brightness_does():
    p = Preprocessing(4, (0.0,) * 3, (1.0,) * 3)
    jitter = train_transform(p, AugmentConfig(hflip=0.0, color_jitter=0.4))
    hues = []
    for _ in range(100):
        hue, *_ = colorsys.rgb_to_hsv(*jitter(Image.new("RGB", (4, 4), (200, 60, 60)))[:, 0, 0].tolist())
        hues.append(min(hue, 1 - hue))
    assert 0.08 < max(hues) < 0.1 + 1 / 255


def test_preprocessing_survives_json():
    assert Preprocessing.from_dict(P.to_dict()) == P


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("size", "crop_pct"), [(224, 0.9), (96, 0.95), (64, 1.0), (48, 0.875)])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("shape", [(300, 200), (70, 131)])
def test_validation_sees_what_timm_shows_at_any_size(size, crop_pct, crop_mode, interpolation, shape):
    p = Preprocessing(size, (0.5, 0.4, 0.3), (0.5,) * 3, interpolation, crop_pct, crop_mode)
    settings = {"interpolation": interpolation, "crop_pct": crop_pct, "crop_mode": crop_mode}
    theirs = create_transform(size, mean=p.mean, std=p.std, **settings)
    torch.testing.assert_close(eval_transform(p)(picture(*shape)), theirs(picture(*shape)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("crop_scale", 0.0),
        ("crop_scale", 1.2),
        ("hflip", 2.0),
        ("color_jitter", 3.0),
        ("rotate", -5.0),
        ("erase", -0.1),
    ],
)
def test_augmentation_out_of_range_is_refused(name, value):
    with pytest.raises(ConfigError, match=rf"data\.augment\.{name}={value}: expected"):
        AugmentConfig(**{name: value})
