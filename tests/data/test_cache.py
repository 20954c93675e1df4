"""What is cached is found again, and is not found once anything it hangs on has changed."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_diffusion as tiny
import torch
from PIL import Image

from vislora.data.cache import TensorCache, content_key, weights_key
from vislora.data.captions import Captioned
from vislora.data.encoded import Gallery, LatentSet, PixelSet, encode
from vislora.data.order import SampleKey
from vislora.data.splits import Pixels
from vislora.errors import DataError
from vislora.models.diffusion import PipelineEncoder, model_key

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VISLORA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def pipe(tmp_path):
    return tiny.stable_diffusion(tmp_path / "tokenizer")


class Counting(PipelineEncoder):
    """Counts what it is asked to encode."""

    def __init__(self, pipe):
        super().__init__(pipe, CPU)
        self.pictures = self.captions = 0

    def images(self, images):
        self.pictures += len(images)
        return super().images(images)

    def text(self, tokens):
        self.captions += len(tokens["input_ids"])
        return super().text(tokens)


def test_an_entry_that_is_damaged_or_gone_is_named(tmp_path):
    cache = TensorCache("latents")
    cache.write("abc", {"x": torch.ones(2)})
    (file,) = tmp_path.rglob("abc.safetensors")
    file.write_bytes(b"")
    for _ in range(2):
        with pytest.raises(DataError, match=rf"{file} of the cache can't be read \(.*\); delete it"):
            cache.read("abc")
        file.unlink(missing_ok=True)


def gallery(size=(16, 16), captions=("a", "b", "a"), change=0, hflip=0.0):
    pixels = np.random.default_rng(0).integers(0, 255, (3, 20, 20, 3), dtype=np.uint8)
    pixels[0, 10, 10, 0] ^= change
    captioned = Captioned(list(captions), ["x", "y", "z"], Pixels(pixels))
    return Gallery(captioned, [size] * 3, [1.0, 0.5, 2.0], [0, 1, 2, 0], hflip)


def encoded(shown, pipe):
    """How many pictures and captions had to be encoded."""
    encoder = Counting(pipe)
    encode(shown, encoder, with_text=True)
    return encoder.pictures, encoder.captions


def test_nothing_is_encoded_twice(pipe):
    assert encoded(gallery(), pipe) == (3, 3)  # "a", "b" and the empty caption
    assert encoded(gallery(), pipe) == (0, 0)


def test_another_pixel_size_or_caption_is_another_entry(pipe):
    encoded(gallery(), pipe)
    assert encoded(gallery(change=1), pipe) == (1, 0)
    assert encoded(gallery(size=(16, 8)), pipe) == (3, 0)
    assert encoded(gallery(captions=("a", "b", "c")), pipe) == (0, 1)
    assert encoded(gallery(hflip=0.5), pipe) == (3, 0)  # the mirrored ones


@torch.no_grad()
def test_other_weights_and_settings_are_another_entry(pipe):
    encoded(gallery(), pipe)
    pipe.vae.decoder.conv_out.weight[0, 0, 0, 0] += 1e-6
    assert encoded(gallery(), pipe) == (3, 0)
    next(pipe.text_encoder.parameters())[0] += 1e-6
    assert encoded(gallery(), pipe) == (0, 3)
    pipe.vae.register_to_config(scaling_factor=0.5)
    assert encoded(gallery(), pipe) == (3, 0)
    pipe.text_encoder.config.eos_token_id += 1  # where the text is summed up
    assert encoded(gallery(), pipe) == (0, 3)


def test_the_same_pixels_cut_from_a_picture_of_another_size_are_another_entry(pipe):
    for side, pictures in ((20, 1), (40, 1), (20, 0)):  # with them lies what SDXL is told of the picture
        shown = Gallery(Captioned(["a"], ["x"], [Image.new("RGB", (side, side), "red")]), [(16, 16)], [1.0], [0])
        assert encoded(shown, pipe)[0] == pictures


def test_other_tokens_are_another_entry(pipe):
    encoded(gallery(), pipe)
    pipe.tokenizer.pad_token = "a</w>"  # as Stable Diffusion 2 pads with another one than 1
    assert encoded(gallery(), pipe) == (0, 3)


@torch.no_grad()
def test_other_weights_of_any_text_encoder_are_another_entry(tmp_path):
    pipe = tiny.stable_diffusion_xl(tmp_path / "words")
    encoded(gallery(), pipe)
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        next(encoder.parameters())[0] += 1e-6
        assert encoded(gallery(), pipe) == (0, 3)


def test_a_picture_that_is_not_square_is_told_as_sdxl_was_told_it(pipe):
    image = Image.new("RGB", (30, 40))
    shown = Gallery(Captioned(["a"], ["x"], [image]), [(24, 16)], [1.0], [0])
    cached = LatentSet(shown, {}, encode(shown, PipelineEncoder(pipe, CPU), with_text=False))
    # 30 x 40 covers 24 x 16 as 24 x 32, of which 8 rows go above and below: height and width, top and left, both again
    for dataset in (cached, PixelSet(shown, {})):
        assert dataset[SampleKey(0, 0, 0)]["text"]["time_ids"].tolist() == [40, 30, 8, 0, 16, 24]


def test_a_picture_is_mirrored_from_left_to_right():
    pixels = np.random.default_rng(0).integers(0, 255, (1, 16, 16, 3), dtype=np.uint8)
    shown = Gallery(Captioned(["a"], ["x"], Pixels(pixels)), [(16, 16)], [1.0], [0], hflip=1.0)
    found = PixelSet(shown, {})[SampleKey(0, 0, 0)]["images"]
    assert np.array_equal(((found + 1) * 127.5).round().permute(1, 2, 0).numpy(), pixels[0, :, ::-1])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_autoencoder_in_half_precision_computes_in_single(tmp_path, dtype):
    vae = tiny.stable_diffusion_xl(tmp_path / "words").vae.to(dtype)
    images = 2 * torch.rand(1, 3, 16, 16) - 1
    expected = copy.deepcopy(vae).float().encode(images).latent_dist.mean * vae.config.scaling_factor
    before = copy.deepcopy(vae.state_dict())
    encoder = PipelineEncoder(SimpleNamespace(vae=vae), CPU)
    torch.testing.assert_close(encoder.images(images), expected)
    assert all(torch.equal(now, before[name]) and now.dtype == dtype for name, now in vae.state_dict().items())
    assert encoder.image_key != model_key([vae])  # as which other versions kept what half precision gave


def test_showings_are_mirrored_one_by_one_as_often_as_is_set():
    shown = gallery(hflip=0.3)
    epochs = [[shown.sample(SampleKey(0, epoch, index))[1] for index in range(4)] for epoch in range(2000)]
    mirrored = torch.tensor(epochs).double()
    torch.testing.assert_close(mirrored.mean(0), torch.full((4,), 0.3).double(), rtol=0, atol=0.05)
    torch.testing.assert_close(mirrored.T.cov(), 0.21 * torch.eye(4).double(), rtol=0, atol=0.03)


def test_a_cached_sample_is_what_encoding_it_on_the_way_gives(pipe):
    shown, encoder = gallery(hflip=0.5), PipelineEncoder(pipe, CPU)
    cached = LatentSet(shown, None, encode(shown, encoder, with_text=True))
    pixels = PixelSet(shown, encoder.tokens(list(shown.captioned.captions)))
    mirrored = set()
    for epoch in range(8):
        for index in range(4):
            key = SampleKey(5, epoch, index)
            mirrored.add(shown.sample(key))
            one, other = cached[key], pixels[key]
            assert one["seed"] == other["seed"]
            assert one["weight"] == other["weight"] == shown.weights[shown.sample(key)[0]]
            text = encoder.text({name: rows[None] for name, rows in other["text"].items() if name == "input_ids"})
            torch.testing.assert_close(one["text"]["prompt_embeds"], text["prompt_embeds"][0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(one["text"]["time_ids"], other["text"]["time_ids"])
            latents = encoder.images(other["images"][None])[0]
            torch.testing.assert_close(one["latents"], latents, rtol=1e-3, atol=1e-4)
    assert len(mirrored) == 6  # each of three pictures, both ways


def test_every_showing_of_a_picture_has_noise_of_its_own(pipe):
    shown, encoder = gallery(), PipelineEncoder(pipe, CPU)
    showings = PixelSet(shown, encoder.tokens(list(shown.captioned.captions)))
    keys = [SampleKey(seed, epoch, index) for seed in (0, 1) for epoch in (0, 1) for index in (0, 3)]
    assert {shown.sample(key) for key in keys} == {(0, False)}
    assert len({showings[key]["seed"] for key in keys}) == len(keys)


def test_latents_are_those_that_diffusers_decodes_to_the_picture(pipe):
    image = Image.effect_noise((16, 16), 60).convert("RGB")
    shown = Gallery(Captioned(["a"], ["x"], [image]), [(16, 16)], [1.0], [0])
    keys = encode(shown, PipelineEncoder(pipe, CPU), with_text=False)
    latents = LatentSet(shown, {}, keys)[SampleKey(0, 0, 0)]["latents"]
    pixels = pipe.image_processor.preprocess(image)
    with torch.no_grad():
        expected = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
    torch.testing.assert_close(latents[None], expected, rtol=1e-4, atol=1e-5)


def test_keys_tell_lists_apart_that_read_alike():
    lists = [
        ("ab", "c"),
        ("a", "bc"),
        (b"ab", "c"),
        ("ab", "c", None),
        (1,),
        ("1",),
        (b"1",),
        (b"ab", b"c"),
        (b"a", b"bc"),
    ]
    assert len({content_key(*parts) for parts in lists}) == len(lists)


def test_models_without_weights_are_told_apart_by_their_class():
    assert weights_key([torch.nn.ReLU()]) != weights_key([torch.nn.GELU()])


def test_weights_are_told_apart_by_shape_name_and_dtype():
    layers = [torch.nn.Linear(3, 2, bias=False), torch.nn.Linear(2, 3, bias=False), torch.nn.Linear(3, 2, bias=False)]
    for layer in layers:
        layer.weight.data.zero_()
    layers[2].to(torch.bfloat16)
    keys = {weights_key([layer]) for layer in layers}
    layers[0].weight.data[1, 2] = 1
    assert len(keys | {weights_key([layers[0]])}) == 4


def test_an_entry_is_whole_or_not_there(tmp_path):
    cache = TensorCache("things")
    cache.write("abcd", {"x": torch.arange(3)})
    assert "abcd" in cache
    assert "abce" not in cache
    assert cache.read("abcd")["x"].tolist() == [0, 1, 2]
    assert [file.name for file in (tmp_path / "cache" / "things" / "ab").iterdir()] == ["abcd.safetensors"]
