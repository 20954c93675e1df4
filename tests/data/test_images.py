"""Pictures as people have them: read upright, in RGB and at full range, or named."""

import os
import random
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from vislora.data.folder import SUFFIXES
from vislora.data.images import read_image, upright_rgb
from vislora.data.inspection import inspect_files
from vislora.errors import DataError
from vislora.paths import cache_dir

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (8, 12, 3), dtype=np.uint8)


def check_images(paths):
    return [facts.problem for facts in inspect_files(paths).values() if facts.problem is not None]


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


def test_a_phones_picture_with_a_preview_behind_it_is_no_animation(tmp_path):
    shot, preview = Image.fromarray(PIXELS), Image.new("RGB", (4, 4))
    path = save(tmp_path / "phone.jpg", shot, format="MPO", save_all=True, append_images=[preview])
    assert read_image(path).size == (12, 8)
    assert check_images([path]) == []


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
    paths = [*sorted(tmp_path.glob("*")), tmp_path / "missing.jpg"]
    found = {problem.file.name: problem for problem in check_images(paths)}
    assert found.keys() == {"truncated.jpg", "empty.jpg", "text.jpg", "bomb.png", "missing.jpg"}
    for name, problem in found.items():
        assert not problem.usable
        assert name in problem.what
        with pytest.raises(DataError, match=name):
            read_image(tmp_path / name)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_picture_of_another_format_than_its_suffix_says_is_told(tmp_path, suffix):
    other = "JPEG" if suffix not in (".jpg", ".jpeg", ".jfif") else "PNG"
    Image.fromarray(PIXELS).save(tmp_path / f"a{suffix}", other)
    (problem,) = check_images([tmp_path / f"a{suffix}"])
    assert (problem.kinds, problem.usable) == (("suffix",), True)
    assert problem.what == f"a {other} file, although its name ends in {suffix}"
    if Image.registered_extensions().get(suffix) in Image.SAVE:
        Image.fromarray(PIXELS).save(tmp_path / f"b{suffix}")
        assert check_images([tmp_path / f"b{suffix}"]) == []


def test_a_repaired_file_is_checked_again(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"")
    assert len(check_images([path])) == 1
    save(path, Image.fromarray(PIXELS))
    assert check_images([path]) == []


@pytest.mark.parametrize("orientation", range(11))  # 0, 9 and 10 are none
def test_every_orientation_is_turned_as_pillow_turns_it_and_only_once(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "a.png", Image.fromarray(PIXELS), exif=exif)
    with Image.open(path) as picture:
        expected = np.asarray(ImageOps.exif_transpose(picture))
    upright = read_image(path)
    facts = inspect_files([path])[path]
    assert (facts.width, facts.height) == upright.size
    assert np.array_equal(np.asarray(upright), expected)
    assert np.array_equal(np.asarray(upright_rgb(upright)), expected)


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bit_tiff_pictures_of_either_byte_order_are_scaled(tmp_path, order):
    values = np.array([[0, 256, 32768, 65535]], dtype=f"{order}u2")
    path = save(tmp_path / "a.tif", Image.frombytes("I;16B" if order == ">" else "I;16", (4, 1), values.tobytes()))
    assert np.asarray(read_image(path))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_what_is_not_a_number_in_a_float_picture_is_black(tmp_path):
    path = save(tmp_path / "a.tif", Image.fromarray(np.array([[np.nan, 0.5, np.inf, 1.0]], dtype=np.float32)))
    assert np.asarray(read_image(path))[0, :, 0].tolist() == [0, 128, 0, 255]


def test_floats_beyond_1_are_scaled_from_their_own_range(tmp_path):
    path = save(tmp_path / "a.tif", Image.fromarray(np.array([[0.0, 500.0, 1000.0]], dtype=np.float32)))
    assert np.asarray(read_image(path))[0, :, 0].tolist() == [0, 128, 255]


def test_transparent_greys_and_palettes_are_composited_too(tmp_path):
    grey = Image.merge("LA", [Image.new("L", (4, 4), 10), Image.new("L", (4, 4), 0)])
    palette = Image.new("P", (4, 4), 3)
    palette.putpalette([9] * 30)
    save(tmp_path / "grey.png", grey)
    save(tmp_path / "palette.png", palette, transparency=3)
    save(tmp_path / "bytes.png", palette, transparency=bytes([255, 255, 255, 0]))
    for path in tmp_path.iterdir():
        assert np.asarray(read_image(path)).min() == 255
        assert "composited on white" in check_images([path])[0].what


def test_an_animation_damaged_after_its_first_frame_is_used(tmp_path):
    frames = [Image.fromarray(np.roll(PIXELS, i, 0)).quantize(8) for i in range(3)]
    path = save(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])
    data = bytearray(path.read_bytes())
    second = data.index(b"\x21\xf9", data.index(b"\x21\xf9") + 1)
    path.write_bytes(data[: second + 8] + b"\x2c\x00")
    assert read_image(path).size == (12, 8)
    (problem,) = check_images([path])
    assert problem.usable


def test_malformed_files_raise_nothing_but_a_named_error_and_warn_of_nothing(tmp_path):
    """The reader and the check agree on each of 600 damaged files."""
    dice = random.Random(0)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    paths = []
    for kind, options in {"jpg": {"exif": exif}, "png": {"exif": exif}, "webp": {}, "bmp": {}, "gif": {}}.items():
        whole = save(tmp_path / f"whole.{kind}", Image.fromarray(PIXELS), **options).read_bytes()
        for i in range(120):
            damaged = bytearray(whole[: dice.randrange(len(whole))] if i % 3 == 0 else whole)
            for _ in range(0 if i % 3 == 0 else dice.randrange(1, 6)):
                damaged[dice.randrange(len(damaged))] = dice.randrange(256)
            paths.append(tmp_path / f"{i}.{kind}")
            paths[-1].write_bytes(damaged)
    unusable = {problem.file for problem in check_images(paths) if not problem.usable}
    for path in paths:
        if path in unusable:
            with pytest.raises(DataError, match=re.escape(str(path))):
                read_image(path)
        else:
            assert read_image(path).mode == "RGB"
    assert 100 < len(unusable) < 500


def test_a_file_is_decoded_once_as_long_as_it_stays_the_same(tmp_path):
    path = save(tmp_path / "a.png", Image.fromarray(PIXELS).convert("RGBA"))
    before = path.stat()
    first = check_images([path])
    path.write_bytes(bytes(before.st_size))  # what is in it isn't looked at
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert check_images([path]) == first
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert not check_images([path])[0].usable


def test_a_damaged_cache_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("VISLORA_CACHE", str(tmp_path / "cache"))
    path = save(tmp_path / "a.png", Image.fromarray(PIXELS).convert("LA"))
    first = check_images([path])
    (store,) = (cache_dir() / "inspected").iterdir()
    store.write_text('{"a.png": ')
    assert check_images([path]) == first
    assert store.read_text().endswith("}\n")


def test_problems_come_in_the_order_of_the_files_each_once(tmp_path):
    paths = [tmp_path / folder / f"{i}.png" for folder in "ba" for i in (2, 1)]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        save(path, Image.new("RGBA", (2, 2)))
    assert [problem.file for problem in check_images([*paths, paths[0]])] == paths
