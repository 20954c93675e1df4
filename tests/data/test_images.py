"""Pictures as people have them: read upright, in RGB and at full range, or named."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from vislora.data.images import check_images, read_image
from vislora.errors import DataError

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (8, 12, 3), dtype=np.uint8)


def save(path, image, **options):
    image.save(path, **options)
    return path


def test_a_plain_picture_comes_back_pixel_for_pixel(tmp_path):
    path = save(tmp_path / "a.png", Image.fromarray(PIXELS))
    assert np.array_equal(np.asarray(read_image(path)), PIXELS)
    assert check_images([path]) == []


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (2, lambda p: p[:, ::-1]),
        (3, lambda p: p[::-1, ::-1]),
        (6, lambda p: np.rot90(p, -1)),
        (8, lambda p: np.rot90(p, 1)),
    ],
)
def test_exif_orientation_is_followed(tmp_path, orientation, upright):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "a.png", Image.fromarray(PIXELS), exif=exif)
    assert np.array_equal(np.asarray(read_image(path)), upright(PIXELS))
    (problem,) = check_images([path])
    assert problem.usable
    assert "EXIF" in problem.what


def test_16_bit_pictures_are_scaled_not_clipped(tmp_path):
    deep = RNG.integers(0, 65536, (8, 12), dtype=np.uint16)
    path = save(tmp_path / "a.png", Image.fromarray(deep))
    grey = np.asarray(read_image(path))
    assert np.abs(grey[..., 0].astype(float) - deep / 257).max() <= 0.5
    assert np.array_equal(grey[..., 0], grey[..., 2])
    (problem,) = check_images([path])
    assert "8 bits" in problem.what


def test_a_16_bit_picture_of_tiny_values_stays_dark(tmp_path):
    path = save(tmp_path / "a.png", Image.fromarray(np.ones((4, 4), dtype=np.uint16)))
    assert np.asarray(read_image(path)).max() == 0


def test_float_pictures_are_scaled_from_0_to_1(tmp_path):
    path = save(tmp_path / "a.tif", Image.fromarray(np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)))
    grey = np.asarray(read_image(path))[..., 0]
    assert grey.min() == 0
    assert grey.max() == 255


def test_transparency_is_composited_on_white(tmp_path):
    rgba = np.dstack([PIXELS, np.full((8, 12), 255, np.uint8)])
    rgba[:, :6, 3] = 0
    path = save(tmp_path / "a.png", Image.fromarray(rgba))
    seen = np.asarray(read_image(path))
    assert (seen[:, :6] == 255).all()
    assert np.array_equal(seen[:, 6:], PIXELS[:, 6:])


def test_cmyk_palette_grey_and_animated_pictures_are_read_as_rgb(tmp_path):
    cmyk = save(tmp_path / "cmyk.jpg", Image.fromarray(PIXELS).convert("CMYK"))
    palette = save(tmp_path / "palette.gif", Image.fromarray(PIXELS).quantize(16))
    grey = save(tmp_path / "grey.png", Image.fromarray(PIXELS).convert("L"))
    first, second = Image.new("RGB", (5, 5), "red"), Image.new("RGB", (5, 5), "blue")
    animated = save(tmp_path / "animated.gif", first, save_all=True, append_images=[second])
    paths = [cmyk, palette, grey, animated]
    assert {read_image(path).mode for path in paths} == {"RGB"}
    assert read_image(animated).getpixel((2, 2)) == (254, 0, 0) or read_image(animated).getpixel((2, 2)) == (255, 0, 0)
    found = {problem.file.name: problem for problem in check_images(paths)}
    assert found.keys() == {"cmyk.jpg", "animated.gif"}
    assert all(problem.usable for problem in found.values())
    assert "first of 2 frames" in found["animated.gif"].what


def _bomb(path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


def test_what_can_not_be_read_is_named_with_a_reason(tmp_path):
    whole = save(tmp_path / "whole.jpg", Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)))
    (tmp_path / "truncated.jpg").write_bytes(whole.read_bytes()[:900])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("not a picture")
    _bomb(tmp_path / "bomb.png")
    paths = sorted(tmp_path.glob("*")) + [tmp_path / "missing.jpg"]
    found = {problem.file.name: problem for problem in check_images(paths)}
    assert found.keys() == {"truncated.jpg", "empty.jpg", "text.jpg", "bomb.png", "missing.jpg"}
    for name, problem in found.items():
        assert not problem.usable
        assert name in problem.what
        with pytest.raises(DataError, match=name):
            read_image(tmp_path / name)


def test_a_repaired_file_is_checked_again(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"")
    assert len(check_images([path])) == 1
    save(path, Image.fromarray(PIXELS))
    assert check_images([path]) == []
