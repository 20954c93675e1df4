"""python assets/pretrain_diffusion.py [--resume RUN | --warm [--start-as right=dusk]] [--epochs N] [OVERRIDES …]

Pretrains the text-to-image pipeline that ships, on drawings of the named species in the natural style with their plain
captions, and writes it to assets/sd_birds (fp16). The autoencoder must be there: assets/pretrain_autoencoder.py.

Quality decides when it is done: resume with more epochs to train longer, or start from the weights that are there
(--warm). On a busy CPU two processes of one thread get further than one of two:
OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=1 torchrun --nproc-per-node 2 assets/pretrain_diffusion.py

With birds that face left as often as right, seventeen thousand steps taught neither word: the pictures mirror each
other, and as long as the two words act alike, the mean gradient that would separate them is zero. --warm --start-as
right=dusk starts one of them from the embedding of a word that has an effect already, and within a few hundred steps
they separate.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from vislora.checkpoint import Checkpoint, load_trainable_state
from vislora.compose import configure
from vislora.config.data import BirdsData
from vislora.config.training import Precision
from vislora.data.birds import SPECIES, caption, seeded_scene
from vislora.data.drawn import drawing_seeds, drawn_birds
from vislora.data.order import Order, mix
from vislora.files import write_json
from vislora.logs import MetricLog
from vislora.models.denoiser import Denoiser, encode_images, tokenize
from vislora.objectives.diffusion import Diffusion
from vislora.objectives.schedules import schedule
from vislora.paths import ASSETS
from vislora.precision import new_accelerator, resolve_precision
from vislora.trainer import Trainer

PIPELINE = ASSETS / "sd_birds"
TOKENS = 24  # the longest caption has 18
# Words that no caption here holds, so that a style or a subject can have a word of its own.
SPARE_WORDS = "ink sketch pencil drawing painting watercolour pixel art flat style in of a the photo sks bird birds"
PREVIEWED = (
    "a northern cardinal on a branch, facing left",
    "a blue jay in the grass, facing right",
    "an american goldfinch flying in the sky, facing left",
    "a mallard swimming, facing right",
    "a barn owl on a wire, facing left",
    "an atlantic puffin on a rock, facing right",
    "a ruby-throated hummingbird hovering by a flower, facing right",
    "a great blue heron in the reeds, facing left",
    "a downy woodpecker clinging to a trunk, facing right",
    "a baltimore oriole in the snow, facing left",
    "an american robin at a feeder, facing right",
    "a belted kingfisher on a branch, facing left",
)
SETTINGS = [
    "model=embedded",
    "data=birds",
    "data.train_per_species=600",
    "data.val_per_species=10",
    "data.test_per_species=0",
    "data.difficulty=0.1",
    "optim.lr=1e-3",
    "optim.weight_decay=0.01",
    "optim.betas=[0.9,0.99]",
    "optim.warmup=0.02",
    "trainer.batch_size=32",
    "trainer.keep=last",
    "trainer.ema=0.999",
    "trainer.checkpoint_every=250",
    "trainer.preview_every=500",
]


def make_tokenizer(captions: list[str], folder: Path) -> None:
    """Write a tokenizer for which each word of the captions is one token, and any other word some pieces of it."""
    alphabet = sorted(ByteLevel.alphabet())
    words = Tokenizer(BPE(end_of_word_suffix="</w>"))
    plain = CLIPTokenizer({c: i for i, c in enumerate(["<|startoftext|>", "<|endoftext|>", *alphabet])}, [])
    words.pre_tokenizer = plain.backend_tokenizer.pre_tokenizer
    # Merging goes on for as long as any word is in pieces.
    trainer = BpeTrainer(vocab_size=10_000, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False)
    words.train_from_iterator([*captions, SPARE_WORDS], trainer)
    model = json.loads(words.to_str())["model"]
    letters = [*alphabet, *(f"{letter}</w>" for letter in alphabet)]
    merged = [a + b for a, b in model["merges"]]
    vocabulary = list(dict.fromkeys(["<|startoftext|>", "<|endoftext|>", *letters, *merged]))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in model["merges"]))
    about = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS}
    about |= {"bos_token": "<|startoftext|>", "unk_token": "<|endoftext|>"}
    about |= {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")


def make_pipeline(tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    """The pipeline with fresh weights but for the autoencoder's."""
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            projection_dim=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        block_out_channels=(64, 96, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        attention_head_dim=(2, 3, 4),  # heads, in this class
        cross_attention_dim=128,
        norm_num_groups=16,
    )
    return StableDiffusionPipeline(
        vae=AutoencoderTiny.from_pretrained(PIPELINE / "vae"),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(
            beta_schedule="squaredcos_cap_v2",
            prediction_type="v_prediction",
            timestep_spacing="trailing",
            steps_offset=1,
            clip_sample=False,
            set_alpha_to_one=True,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@torch.no_grad()
def start_as(pipe: StableDiffusionPipeline, word: str, other: str) -> None:
    """Give a word of the vocabulary another one's embedding."""
    numbers, embeddings = pipe.tokenizer.get_vocab(), pipe.text_encoder.get_input_embeddings().weight
    embeddings[numbers[f"{word}</w>"]] = embeddings[numbers[f"{other}</w>"]]


def captions_of(data: BirdsData, split: str, count: int) -> list[str]:
    """Of the drawings of a split, in their order."""
    return [
        caption(SPECIES[name], seeded_scene(SPECIES[name], seed, data.difficulty))
        for name in data.species
        for seed in drawing_seeds(data.seed, split, count)
    ]


def latents_of(vae: nn.Module, images: np.ndarray) -> Tensor:
    """Of pictures uint8 [N, H, W, 3]."""
    parts = torch.arange(len(images)).split(256)
    scaled = (torch.from_numpy(images[part.numpy()]).permute(0, 3, 1, 2).float() / 127.5 - 1.0 for part in parts)
    return torch.cat([encode_images(vae, part) for part in scaled])


def batch_of(latents: Tensor, tokens: Tensor, indices: list[int], seeds: list[int]) -> dict:
    return {
        "latents": latents[indices],
        "seed": torch.tensor(seeds),
        "weight": torch.ones(len(indices)),
        "text": {"input_ids": tokens[indices]},
    }


def draw(pipe: StableDiffusionPipeline, prompts: tuple[str, ...], file: Path, guidance: float = 3.0) -> None:
    """Two pictures of each prompt, below each other, at twice their size."""
    pipe.set_progress_bar_config(disable=True)
    rows = []
    for seed in (0, 1):
        start = [torch.Generator().manual_seed(mix(seed, i)) for i in range(len(prompts))]
        images = pipe(
            list(prompts), num_inference_steps=20, guidance_scale=guidance, generator=start, output_type="np"
        ).images
        rows.append(np.concatenate(list(images), axis=1))
    picture = Image.fromarray((np.concatenate(rows) * 255).round().astype(np.uint8))
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.LANCZOS).save(file)


def export(pipe: StableDiffusionPipeline) -> None:
    """Write the pipeline in fp16."""
    pipe.tokenizer = CLIPTokenizer.from_pretrained(PIPELINE / "tokenizer")  # a used one is saved with its last padding
    pipe.to(torch.float16).save_pretrained(PIPELINE)
    # transformers 5.6 took the level text_model away: earlier releases, and other programs, find CLIP's weights by it
    file = PIPELINE / "text_encoder" / "model.safetensors"
    weights = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
    # diffusers loads its models in float32 unless told otherwise, transformers what its config says: they must agree.
    file = PIPELINE / "text_encoder" / "config.json"
    write_json(json.loads(file.read_text()) | {"dtype": "float32"}, file)
    file = PIPELINE / "vae" / "config.json"
    about = json.loads(file.read_text())
    about.pop("_name_or_path", None)  # a folder of the machine this runs on
    write_json(about, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[2])
    parser.add_argument("--out", type=Path, default=Path("runs/pretrain_diffusion"))
    parser.add_argument("--resume", type=Path, help="the folder of a run that was stopped")
    parser.add_argument("--warm", action="store_true", help="start from the weights in assets/sd_birds")
    parser.add_argument("--start-as", metavar="WORD=OTHER", help="with --warm: a word starts as another's copy")
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--export", type=Path, help="write the averages of this run's last checkpoint, and stop")
    parser.add_argument("overrides", nargs="*", help="of the settings, as for vislora.train: optim.lr=5e-4")
    options = parser.parse_args()
    if options.start_as and (not options.warm or options.start_as.count("=") != 1):
        parser.error("--start-as takes WORD=OTHER, and goes with --warm")
    options.out.mkdir(parents=True, exist_ok=True)
    resume = [f"trainer.resume={options.resume}"] if options.resume else []
    config = configure("train", [*SETTINGS, *resume, f"trainer.epochs={options.epochs}", *options.overrides])
    precision = resolve_precision(Precision.auto, torch.device("cpu"))
    accelerator = new_accelerator(precision)

    with accelerator.main_process_first():
        splits = drawn_birds(config.data)
    captions = {
        "train": captions_of(config.data, "train", config.data.train_per_species),
        "val": captions_of(config.data, "val", config.data.val_per_species),
    }
    torch.manual_seed(0)
    words = PIPELINE / "tokenizer"
    with accelerator.main_process_first():
        if not words.is_dir():  # ties between merges are broken by chance: a run goes on with the numbers it began with
            make_tokenizer(captions["train"], words)
    tokenizer = CLIPTokenizer.from_pretrained(words)
    pipe = make_pipeline(tokenizer)
    if options.warm:
        for part in ("unet", "text_encoder"):
            module = getattr(pipe, part)
            module.load_state_dict(
                type(module).from_pretrained(PIPELINE / part, torch_dtype=torch.float32).state_dict()
            )
    if options.start_as:
        start_as(pipe, *options.start_as.split("="))
    model = Denoiser(pipe, text=True)
    if options.export:
        load_trainable_state(model, load_file(Checkpoint.open(options.export).folder / "ema.safetensors"))
        export(pipe)
        return
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.unet.set_attn_processor(AttnProcessor())  # the fused attention's backward pass is slower on a CPU
    tokens = {name: tokenize(pipe, texts)["input_ids"] for name, texts in captions.items()}
    latents = {
        name: latents_of(pipe.vae, split.pictures.array)
        for name, split in (("train", splits.train), ("val", splits.val))
    }
    deviation, mean = torch.std_mean(latents["train"], (0, 2, 3))
    print(f"latent means {mean.numpy().round(2)}, deviations {deviation.numpy().round(2)}", flush=True)
    rank, world = accelerator.process_index, accelerator.num_processes
    order = Order(len(tokens["train"]), config.trainer.batch_size, config.seed, rank=rank, world=world)
    validation = [
        batch_of(latents["val"], tokens["val"], part.tolist(), [mix(i) for i in part.tolist()])
        for part in torch.arange(rank, len(tokens["val"]), world).split(90)
    ]

    def batches(start: int) -> Iterator[dict]:
        for step in range(start, config.trainer.epochs * order.steps_per_epoch):
            (keys,) = order.micro_batches(step)
            yield batch_of(latents["train"], tokens["train"], [key.index for key in keys], [mix(*key) for key in keys])

    Trainer(
        model=model,
        objective=Diffusion(schedule(pipe.scheduler, accelerator.device), tokenize(pipe, [""]), caption_dropout=0.1),
        order=order,
        batches=batches,
        validation=validation,
        head=(),
        optim=config.optim,
        config=config.trainer,
        accelerator=accelerator,
        log=MetricLog(options.out, accelerator),
        out=options.out,
        run={"precision": precision.value},
        preview=lambda file: draw(pipe, PREVIEWED, file),
    ).fit()
    if accelerator.is_main_process:
        pipe.unet.to(memory_format=torch.contiguous_format).set_default_attn_processor()
        export(pipe)


if __name__ == "__main__":
    main()
