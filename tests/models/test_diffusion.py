"""Pipelines are opened whole or not at all."""

import json
import shutil

import diffusers
import pytest
import tiny_diffusion as tiny
import torch
from diffusers.configuration_utils import FrozenDict
from safetensors.torch import load_file, save_file

from vislora.config.model import PipelineConfig
from vislora.errors import ModelError
from vislora.models.denoiser import encode_images, readers
from vislora.models.diffusion import (
    PipelineEncoder,
    configs_key,
    load_pipeline,
    pipeline_class,
    readers_of,
    resolution,
    scheduler_class,
)

PARTS = {
    "unet": ("unet/diffusion_pytorch_model.safetensors", "mid_block.attentions.0.proj_out.weight"),
    "vae": ("vae/diffusion_pytorch_model.safetensors", "decoder.conv_out.bias"),
    "text_encoder": ("text_encoder/model.safetensors", "encoder.layers.1.mlp.fc2.weight"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("pipe")
    tiny.stable_diffusion(place / "made").save_pretrained(place / "saved")
    return place / "saved"


@pytest.mark.parametrize("kind", ["stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux"])
def test_what_a_pipeline_reads_of_a_caption_is_told_without_its_weights(kind, tmp_path):
    pipe = getattr(tiny, kind)(tmp_path / "words")
    pipe.save_pretrained(tmp_path / "saved")
    for weights in (tmp_path / "saved").rglob("*.safetensors"):
        weights.unlink()
    found = readers_of(PipelineConfig(str(tmp_path / "saved")))
    assert [reader.length for reader in found] == [reader.length for reader in readers(pipe)]
    captions = ["an owl", "a very long text"]
    for one, other in zip(found, readers(pipe), strict=True):
        assert one.tokenizer(captions).input_ids == other.tokenizer(captions).input_ids


@pytest.mark.parametrize("part", PARTS)
def test_a_weight_that_no_file_holds_is_named(folder, tmp_path, part):
    broken = shutil.copytree(folder, tmp_path / "broken")
    file, suffix = PARTS[part]
    weights = load_file(broken / file)
    (lost,) = [name for name in weights if name.endswith(suffix)]
    save_file({name: tensor for name, tensor in weights.items() if name != lost}, broken / file, {"format": "pt"})
    with pytest.raises(ModelError, match=rf"broken/{part}: no file holds .*{suffix} of \w+; fetch the model again"):
        load_pipeline(PipelineConfig(str(broken)))


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_parts_and_their_types_are_those_that_diffusers_opens(folder, tmp_path, variant):
    """With a variant for some of the parts, as many models on the hub have it."""
    varied = shutil.copytree(folder, tmp_path / "varied")
    if variant:
        (varied / "unet" / "diffusion_pytorch_model.safetensors").rename(
            varied / "unet" / "diffusion_pytorch_model.fp16.safetensors"
        )
    mine = load_pipeline(PipelineConfig(str(varied), variant=variant), torch.bfloat16)
    theirs = diffusers.DiffusionPipeline.from_pretrained(varied, variant=variant, torch_dtype=torch.bfloat16)
    assert type(mine) is type(theirs)
    for part in PARTS:
        a, b = getattr(mine, part).state_dict(), getattr(theirs, part).state_dict()
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def test_a_processor_whose_class_is_gone_is_left_out(folder, tmp_path):
    """As the first releases of Stable Diffusion name it."""
    old = shutil.copytree(folder, tmp_path / "old")
    index = json.loads((old / "model_index.json").read_text())
    index |= {"feature_extractor": ["transformers", "CLIPFeatureExtractor"]}
    (old / "model_index.json").write_text(json.dumps(index))
    assert load_pipeline(PipelineConfig(str(old))).feature_extractor is None


def test_a_size_that_the_configs_dont_tell_is_asked_for(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    config = json.loads((other / "vae" / "config.json").read_text())
    del config["block_out_channels"]
    (other / "vae" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"isn't in its configs; give data\.size"):
        resolution(PipelineConfig(str(other)))


@pytest.mark.parametrize("make", [tiny.stable_diffusion, tiny.stable_diffusion_xl, tiny.stable_diffusion_3, tiny.flux])
def test_the_pictures_size_is_the_pipelines_and_told_without_its_weights(make, tmp_path):
    pipe = make(tmp_path / "made")
    pipe.save_pretrained(tmp_path / "saved")
    for weights in (tmp_path / "saved").rglob("*.safetensors"):
        weights.unlink()
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    latents = getattr(denoiser.config, "sample_size", None) or pipe.default_sample_size
    assert resolution(PipelineConfig(str(tmp_path / "saved"))) == latents * pipe.vae_scale_factor


def test_pictures_are_encoded_together_up_to_so_many_pixels(folder, monkeypatch):
    monkeypatch.setattr("vislora.models.diffusion._PIXELS_AT_ONCE", 64 * 64)
    pipe = load_pipeline(PipelineConfig(str(folder)))
    encoder, batches = PipelineEncoder(pipe, torch.device("cpu")), []
    pipe.vae.encoder.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    for count, height, width, parts in ((5, 32, 32, [4, 1]), (2, 48, 84, [1, 1]), (9, 16, 8, [9])):
        images = torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
        latents = encoder.images(images)
        assert batches == parts
        torch.testing.assert_close(latents, encode_images(pipe.vae, images), rtol=1e-4, atol=1e-5)
        batches.clear()


def test_what_a_pipeline_encoded_is_found_again_after_it_has_moved(folder, tmp_path):
    keys = []
    for place in (folder, shutil.copytree(folder, tmp_path / "moved")):
        encoder = PipelineEncoder(load_pipeline(PipelineConfig(str(place))), torch.device("cpu"))
        keys.append((encoder.image_key, encoder.text_key))
    assert keys[0] == keys[1]


def test_a_model_out_of_reach_is_told_in_whole_words_with_the_way_out(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError) as told:
        load_pipeline(PipelineConfig("nobody/nothing"))
    message, _, way_out = str(told.value).partition("; where the hub can't be reached, ")
    assert "model.name=FOLDER" in way_out
    said = message.removeprefix("diffusers can't open nobody/nothing: ")
    whole = " ".join(str(told.value.__cause__).split())
    if len(whole) > 300:  # as diffusers 0.42 tells it
        assert said.endswith(" …")
        assert 250 < len(said) <= 300
    assert whole.startswith(said.removesuffix("…"))
    with pytest.raises(ModelError, match=r"a file named model_index\.json; where the hub"):  # a sentence's end is none
        pipeline_class(PipelineConfig("nobody/nothing"))


@pytest.mark.parametrize("name", [["pipeline", "MyPipeline"], None])
def test_class_that_isnt_one_of_diffusers_is_told(folder, tmp_path, name):
    other = shutil.copytree(folder, tmp_path / "other")
    for file in (other / "model_index.json", other / "scheduler" / "scheduler_config.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": name}))
    with pytest.raises(ModelError, match=r"other: the class of its pipeline is .*; expected one of diffusers, since"):
        pipeline_class(PipelineConfig(str(other)))
    with pytest.raises(ModelError, match=r"other: the class of its scheduler is .*; expected one of diffusers, since"):
        scheduler_class(PipelineConfig(str(other)))


@pytest.mark.parametrize("asked", [pipeline_class, readers_of, load_pipeline])
def test_an_index_that_is_no_object_is_told(folder, tmp_path, asked):
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "model_index.json").write_text('["StableDiffusionPipeline"]')
    with pytest.raises(ModelError, match=r"/other"):
        asked(PipelineConfig(str(other)))


def test_the_configs_of_a_pipeline_are_what_its_files_say(folder, tmp_path):
    """A version of diffusers that knows one setting more gives it its default."""
    older = shutil.copytree(folder, tmp_path / "older")
    file = older / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    del config["rescale_betas_zero_snr"]
    file.write_text(json.dumps(config))
    pipe = load_pipeline(PipelineConfig(str(older)))
    before = configs_key(pipe)
    assert pipe.scheduler.config.rescale_betas_zero_snr is False
    pipe.scheduler._internal_dict = FrozenDict(pipe.scheduler.config | {"rescale_betas_zero_snr": True})
    assert configs_key(pipe) == before
    pipe.scheduler._internal_dict = FrozenDict(pipe.scheduler.config | {"prediction_type": "v_prediction"})
    assert configs_key(pipe) != before


@pytest.mark.parametrize("kind", ["stable_diffusion", "stable_diffusion_3"])
def test_a_tokenizer_without_its_words_is_named(kind, tmp_path):
    """transformers makes a blank one, to which all captions are alike."""
    getattr(tiny, kind)(tmp_path / "words").save_pretrained(tmp_path / "saved")
    config = PipelineConfig(str(tmp_path / "saved"))
    last = sorted(tmp_path.glob("saved/tokenizer*"))[-1]
    assert len(readers(load_pipeline(config))) == len(sorted(tmp_path.glob("saved/tokenizer*")))
    for file in last.iterdir():
        if file.name != "tokenizer_config.json":
            file.unlink()
    with pytest.raises(ModelError, match=rf"^{last} needs .*, without which a (CLIP|T5)Tokenizer"):
        load_pipeline(config)


def test_a_pipeline_without_a_tokenizer_tells_nothing_of_what_it_reads(folder, tmp_path):
    bare = shutil.copytree(folder, tmp_path / "bare")
    index = json.loads((bare / "model_index.json").read_text())
    (bare / "model_index.json").write_text(json.dumps(index | {"tokenizer": [None, None]}))
    assert readers_of(PipelineConfig(str(bare))) == []


@pytest.mark.parametrize("make", [tiny.stable_diffusion, tiny.stable_diffusion_xl])
def test_a_scheduler_that_the_pipeline_can_not_draw_with_is_refused(make, tmp_path):
    pipe = make(tmp_path / "words")
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(AttributeError, match="init_noise_sigma"):
        tiny.draw(pipe)
    pipe.save_pretrained(tmp_path / "pipe")
    with pytest.raises(
        ModelError, match=r"FlowMatchEulerDiscreteScheduler, with which StableDiffusion\w*Pipeline can't"
    ):
        load_pipeline(PipelineConfig(str(tmp_path / "pipe")))


def test_such_a_scheduler_is_refused_by_the_denoisers_class(tmp_path):
    components = tiny.stable_diffusion(tmp_path / "words").components
    components["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.LatentConsistencyModelPipeline(**components, requires_safety_checker=False)
    pipe.save_pretrained(tmp_path / "pipe")
    with pytest.raises(ModelError, match="FlowMatchEulerDiscreteScheduler, with which LatentConsistencyModelPipeline"):
        load_pipeline(PipelineConfig(str(tmp_path / "pipe")))
