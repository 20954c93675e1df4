"""Recipes, overrides, and the sentence a wrong one is answered with."""

import itertools
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from vislora import predict
from vislora.compose import _HYDRA, command, configure, quoted
from vislora.config.adapter import LoraAdapter, ProbeAdapter, Target
from vislora.config.data import DATA_OPTIONS, BirdsData, CaptionedData, DataConfig, ImageFolderData, data_from_dict
from vislora.config.data import data_to_dict as to_dict
from vislora.config.training import Precision
from vislora.data.splits import Files
from vislora.errors import ConfigError
from vislora.paths import CONF, RECIPES, cache_dir


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_every_recipe_composes_and_begins_with_its_command(recipe):
    first, second = (RECIPES / f"{recipe}.yaml").read_text().splitlines()[:2]
    assert first == "# @package _global_"
    assert f"{second} ".startswith(f"# python -m vislora.train recipe={recipe} ")
    config = configure("train", second.split()[4:])
    assert isinstance(config.adapter, LoraAdapter)


@pytest.mark.parametrize(
    ("kind", "recipes"), [(CaptionedData, {"sketch_style", "sd15_style"}), (DataConfig, {"vit_birds", "vit_cub"})]
)
def test_recipes_take_any_data_of_their_kind(kind, recipes):
    options = [option for option, schema in DATA_OPTIONS.items() if issubclass(schema, kind)]
    assert len(options) > 1
    for recipe, option in itertools.product(recipes, options):
        words = [f"recipe={recipe}", f"data={option}"]
        missing = [f"data.{key}=x" for key in ("root", "name") if hasattr(DATA_OPTIONS[option], key)]
        assert isinstance(configure("train", [*words, *missing]).data, DATA_OPTIONS[option])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["recipe=sd15_dreambooth", "data=birds_captions"],
            "recipe=sd15_dreambooth sets data.prompt, which the chosen data doesn't have; leave out data=…",
        ),
        (
            ["recipe=sketch_style", "adapter=lora"],
            r"^recipe=sketch_style sets adapter\.targets\[3\] to what can't be there: Invalid value 'proj'",
        ),
    ],
)
def test_a_recipe_made_for_other_data_or_adapters_says_so(words, message):
    with pytest.raises(ConfigError, match=message):
        configure("train", words)


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_the_groups(tmp_path):
    recipe = configure("train", ["recipe=vit_cub"])
    assert recipe.adapter.targets == [Target.q, Target.v]
    assert recipe.adapter.rank == 16
    over = configure("train", ["recipe=vit_cub", "adapter.rank=3", "data=imagefolder", "data.root=/somewhere"])
    assert over.adapter.rank == 3
    assert over.data == ImageFolderData(root="/somewhere", val_fraction=0.1, augment=recipe.data.augment)
    assert isinstance(configure("train", ["recipe=vit_birds", "adapter=probe"]).adapter, ProbeAdapter)
    assert configure("train", ["trainer.precision=fp32"]).trainer.precision is Precision.fp32


def test_an_option_in_place_of_a_recipes_own_keeps_its_values(tmp_path):
    assert configure("train", ["recipe=vit_cub", "model=embedded"]).model.name == "embedded"
    style = configure("train", ["recipe=sd15_style", "model=sd_embedded", "data.root=/somewhere"])
    assert (style.model.name, style.adapter.rank) == ("embedded", 16)
    mlp = ["recipe=vit_cub", "adapter.rank=3", "adapter=lora_mlp"]
    found = configure("train", mlp).adapter
    assert (found.targets, found.rank) == ([Target.qkv, Target.o, Target.mlp], 3)
    assert configure("train", ["recipe=sketch_style", "data=birds_captions"]).data.style == "ink"  # the recipe's own
    twice = configure("train", ["recipe=vit_cub", "adapter=lora_mlp", "adapter=lora_qv"]).adapter  # the last counts
    assert twice.targets == [Target.q, Target.v]
    command = [sys.executable, "-m", "vislora.train", *mlp, "--cfg", "job"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert "rank: 3" in done.stdout
    assert "- mlp" in done.stdout


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.epoch=3", "unknown key trainer.epoch; did you mean trainer.epochs"),
        ("data.root=x", "unknown key data.root, which the chosen data doesn't have; choose .* data=…: captions, csv, "),
        ("data.augment.hflp=1", "did you mean data.augment.hflip"),
        ("+trainer.sped=1", "unknown key trainer.sped"),
        ("+trainer.epochs=3", r"trainer.epochs is there already; write trainer.epochs=… without the \+"),
        ("+recipe=vit_birds", r"recipe is chosen already; to change it write recipe=… without the \+"),
        ("recipe=vit_birds,vit_cub", "recipe=vit_birds,vit_cub are several; choose one, or add --multirun"),
        ("vit_birds", "vit_birds is no setting; did you mean recipe=vit_birds?"),
        ("rank=3", "unknown key rank; did you mean adapter.rank?"),
        ("optim.learning_rate=3", r"did you mean optim\.lr\?"),  # as PEFT's and diffusers' scripts have it
        ("adapter.r=3", r"did you mean adapter\.rank\?"),
        ("trainer.bs=3", r"did you mean trainer\.batch_size\?"),
        ("model.pretrained=true", r"did you mean model\.weights\?"),
        ("trainer.dropout=0.1", r"did you mean adapter\.dropout\?"),  # which is called so elsewhere
        ("trainer.nope=3", "unknown key trainer.nope; `--cfg job` prints"),  # and not its like in no letter but two
        ("output_dir=runs/mine", r"unknown key output_dir; the folder of the run is hydra\.run\.dir=FOLDER"),
        ("out=runs/mine", r"unknown key out; the folder of the run is hydra\.run\.dir=FOLDER"),
        ("split=test", "unknown key split; `--cfg job` prints"),  # that evaluation has it is of no help
        ("trainer.epochs=many", "trainer.epochs=many can't be used"),
        ("trainer.precision=int8", r"expected one of \[auto, fp32, bf16, fp16\]"),
        (
            "recipe=vit_brids",
            r"recipe=vit_brids is not known; did you mean vit_birds\? recipe can be: sd15_dreambooth, sd15_style",
        ),
        ("recipe=cfg/recipe/mine.yaml", r"^recipe=cfg/recipe/mine.yaml: expected a recipe's name; --config-dir FOLDER"),
        ("adapter=lroa", r"did you mean lora\? adapter can be: dora, full"),
        ("recipes=vit_birds", r"unknown key recipes; did you mean recipe=OPTION\?"),
        (str(Path(__file__).parent), "is no setting; did you mean data=imagefolder data.root=/.*tests"),
        ("recipe=null", "recipe=null: expected the name of an option; leave recipe out"),
        ("data=5", "data=5: expected the name of an option"),
        ("model=resnet", "model can be: diffusers, embedded, sd_embedded, timm"),
        ("trainer.epochs", "write key=value"),
        ("data=[", "write key=value"),
        ("data=imagefolder", "data.root has no value"),
        ("adapter.targets=q", r"adapter.targets=q can't be used: expected a list, adapter.targets=\[q\]"),
        (
            "model.name=a, b",
            "'model.name=a, b' has commas: put a text in quotes, 'model.name=\"…\"'",
        ),
        ("adapter.bias=some", r"expected one of \[none, lora_only, all\]"),
        ("+adapter.rank_pattern={qkv:many}", r"rank_pattern=\{qkv:many\} can't be used"),
        ("adapter.rank_pattern={qkv:4}", r"write \+adapter.rank_pattern=… to add it"),
    ],
)
def test_a_wrong_override_is_answered_with_one_sentence(override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        configure("train", [override])
    assert "\n" not in str(caught.value)


def test_an_unknown_command_is_answered_with_those_there_are():
    with pytest.raises(ConfigError, match=r"there is no command 'tune'; there is blend, .*, train$"):
        configure("tune", ["trainer.epochs=1"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["adapter=pissa", "adapter.dora=true"], "adapter.pissa and adapter.dora exclude each other"),
        (["adapter=pissa", "adapter.dropout=0.1"], "adapter.dropout=0.1 would drop principal parts"),
        (["adapter.blocks=[1.5]"], r"adapter.blocks=\[1.5\]: expected numbers, ranges or names of blocks, or a list"),
        (["adapter.blocks=true"], "adapter.blocks=True: expected numbers"),
        (["adapter.blocks=[]"], r"adapter.blocks=\[\]: expected numbers"),
        (["adapter.trained=['norm[']"], r"adapter.trained: 'norm\[' isn't a regular expression"),
    ],
)
def test_settings_that_exclude_each_other_are_answered_with_one_sentence(overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        configure("train", overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("command", "override", "expected"),
    [
        ("train", "trainer.epochs=0", "1 or more"),
        ("train", "trainer.validate_every=0", "1 or more"),
        ("train", "trainer.checkpoint_every=0", "1 or more"),
        ("train", "trainer.patience=0", "1 or more"),
        ("train", "trainer.preview_every=0", "1 or more"),
        ("train", "trainer.workers=-1", "0 or more"),
        ("train", "trainer.ema=1.5", "0 to below 1"),
        ("train", "optim.lr=-1.0", "0 or more"),
        ("train", "optim.lr=nan", "a finite number"),
        ("train recipe=sketch_style", "objective.noise_offset=inf", "a finite number"),
        ("train recipe=sketch_style", "objective.guidance=inf", "a finite number"),
        ("train recipe=sketch_style", "objective.guidance=nan", "a finite number"),
        ("train recipe=sketch_style", "objective.min_snr_gamma=nan", "more than 0, or null"),
        ("train", "optim.warmup=10.0", "0 to 1"),
        ("train", "optim.betas=[0.9]", "two numbers from 0 to below 1"),
        ("train", "optim.betas=[0.9, 1.0]", "two numbers from 0 to below 1"),
        ("train", "objective.label_smoothing=1.0", "0 to below 1"),
        ("train", "model.drop_path=2.0", "0 to 1"),
        ("train", "adapter.rank=0", "1 or more"),
        ("train", "adapter.alpha=nan", "more than 0"),
        ("train", "adapter.alpha=0.0", "more than 0"),
        ("train +adapter.alpha_pattern={alpha:1}", "adapter.alpha=0.0", "more than 0"),
        ("train", "adapter.dropout=1.0", "0 to 0.99"),
        ("train", f"seed={2**64}", f"0 to {2**63 - 1}"),
        ("train", "trainer.batch_size=0", "1 or more"),
        ("train", "trainer.accumulation=0", "1 or more"),
        ("train", "data.crop_pct=0.0", "0.01 to 1"),
        ("train", "data.val_fraction=1.0", "0 to below 1"),
        ("train", "data.augment.hflip=3.0", "0 to 1"),
        ("train", "data.train_per_species=0", "1 or more"),
        ("train recipe=sketch_style", "data.hflip=2.0", "0 to 1"),
        ("train recipe=sketch_style", "data.count=0", "1 or more"),
        ("train recipe=sd15_style data.root=A", "data.val_fraction=1.0", "0 to below 1"),
        ("train recipe=sketch_style", "objective.noise_offset=-1.0", "0 or more"),
        ("train recipe=sketch_style", "objective.caption_dropout=2.0", "0 to 1"),
        ("train recipe=sketch_style", "objective.min_snr_gamma=0.0", "more than 0, or null"),
        ("train recipe=sketch_style", "objective.preview_steps=0", "1 or more"),
        ("evaluate adapter=A", "resamples=1", "2 or more"),
        ("evaluate adapter=A", "seed=-1", f"0 to {2**63 - 1}"),
        ("evaluate adapter=A", "batch_size=0", "1 or more"),
        ("evaluate adapter=A", "maps=-1", "0 or more"),
        ("predict adapter=A images=[a.png]", "top=0", "1 or more"),
        ("predict adapter=A", "images=[]", "at least one picture or folder"),
        ("extract tuned=A out=B", "rank=0", "1 or more"),
        ("resize adapter=A out=B", "energy=1.5", "more than 0 and at most 1"),
        ("doctor", "workers=-1", "0 or more"),
    ],
)
def test_numbers_out_of_range_are_refused(command, override, expected):
    name, *needed = command.split()
    with pytest.raises(ConfigError, match=rf"^{re.escape(override)}: expected {expected}$"):
        configure(name, [*needed, override])


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["data=imagefolder", "data.root="], "data.root is empty; give the folder of the data set"),
        (["recipe=sd15_style", "data.root="], "data.root is empty; give the folder of the data set"),
        (["adapter.start="], "adapter.start is empty; give an adapter's file or folder, or null to start anew"),
        (["trainer.resume="], "trainer.resume is empty; give a run folder or one of its checkpoints, or leave it out"),
    ],
)
def test_an_unset_shell_variable_is_not_the_current_folder(overrides, told):
    with pytest.raises(ConfigError, match=f"^{re.escape(told)}$"):
        configure("train", overrides)


def test_alpha_of_some_layers_that_would_make_nothing_of_them_is_refused():
    with pytest.raises(ConfigError, match=r"^adapter\.alpha_pattern\.qkv=0\.0: expected more than 0$"):
        configure("train", ["+adapter.alpha_pattern={proj:1,qkv:0}"])


def test_no_rank_for_some_layers_is_refused():
    with pytest.raises(ConfigError, match=r"^adapter\.rank_pattern\.qkv=0: expected 1 or more$"):
        configure("train", ["+adapter.rank_pattern={proj:1,qkv:0}"])


def test_clipping_to_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"optim\.clip_norm=0 would leave nothing of the gradient"):
        configure("train", ["recipe=vit_birds", "optim.clip_norm=0"])
    assert configure("train", ["recipe=vit_birds", "optim.clip_norm=null"]).optim.clip_norm is None


def test_a_folder_may_be_called_like_a_setting(tmp_path):
    here = tmp_path / "${x} \\${oc.env:HOME}"
    here.mkdir()
    command = [sys.executable, "-m", "vislora.blend", "adapter=[a,b]", "weights=[1,1]", "out=c"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=here)
    assert done.stderr == "vislora: a isn't there; an adapter is a .safetensors file, or a folder that holds one\n"
    told = to_dict(ImageFolderData(root=str(here)))
    assert data_from_dict(told).root == str(here)


@pytest.mark.parametrize("override", ["data.root=x", "+data.root=x", "data.augment.hflip=1"])
def test_settings_of_a_data_set_that_isnt_chosen_are_refused(override, tmp_path):
    with pytest.raises(ConfigError, match="is a setting of a data set, and none is chosen; give data=OPTION too"):
        configure("evaluate", ["adapter=a", override])
    command = [sys.executable, "-m", "vislora.evaluate", "adapter=a", override]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert configure("evaluate", ["adapter=a", "data=imagefolder", "data.root=x"]).data.root == "x"


@pytest.mark.parametrize(
    "override",
    [
        "train trainer.epoch=3",
        "train trainer.epochs=many",
        "train recipe=nope",
        "train data=imagefolder",
        "train recipe=sketch_style trainer.prefix_cache=memory",
        "train recipe=vit_birds trainer.prefix_cache=memory data.augment.erase=0.2",
        "train recipe=vit_birds data=imagefolder data.root=nowhere",
        "train recipe=vit_birds adapter.start=nowhere",
        "train recipe=vit_birds trainer.resume=nowhere",
        "train recipe=vit_birds model=timm model.name=vit_tiny_patch16_224 model.weights=nowhere",
        "blend adapter=[a,b] weights=[1] out=c",
        "evaluate adapter=a split=all",
    ],
)
def test_the_command_refuses_with_exit_code_2_before_any_slow_import(override, tmp_path):
    command = [sys.executable, "-X", "importtime", "-m", *f"vislora.{override}".split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    imports, said = [], []
    for line in done.stderr.splitlines():
        (imports if line.startswith("import time:") else said).append(line)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(said) == 1
    assert said[0].startswith("vislora: ")
    assert list(tmp_path.rglob("*.*")) == []
    packages = {line.rpartition("|")[2].strip().partition(".")[0] for line in imports}
    assert {"hydra", "vislora"} <= packages
    assert not packages & {"torch", "torchvision", "timm", "diffusers", "transformers", "accelerate", "numpy", "PIL"}


def test_a_recipe_gives_ranks_by_pattern(tmp_path):
    (tmp_path / "recipe").mkdir()
    text = "# @package _global_\nadapter:\n  rank_pattern:\n    'blocks\\.1[01]\\.attn\\.qkv': 16\n"
    (tmp_path / "recipe" / "mine.yaml").write_text(text)
    command = [sys.executable, "-m", "vislora.train", "--config-dir", str(tmp_path), "recipe=mine", "--cfg", "job"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert r"blocks\.1[01]\.attn\.qkv: 16" in done.stdout, done.stderr


def test_a_users_own_recipes_come_from_a_folder_of_theirs(tmp_path):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text("# @package _global_\nadapter:\n  rank: 77\n")
    command = [sys.executable, "-m", "vislora.train", "--config-dir", str(tmp_path), "recipe=mine", "--cfg", "job"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert "rank: 77" in done.stdout


@pytest.mark.parametrize("name", ["grün", "日本", "birds (old)", "it's", "a=b", "a;b#c", "C:\\new", "back\\"])
def test_paths_need_no_quotes_for_hydra(name):
    assert configure("train", ["data=imagefolder", f"data.root=/data/{name}"]).data.root == f"/data/{name}"
    assert configure("predict", [f"adapter=/runs/{name}", f"images=[{quoted(name)}]"]).images == [name]


@pytest.mark.parametrize("name", ["2024_05_01", "1.10", "1e3", "12e5", ".5", "+5", "007", "true", "[set] birds", "'s"])
def test_a_path_is_as_it_is_written_whatever_it_could_be_besides(name):
    config = configure("train", ["data=imagefolder", f"data.root={name}", f"model.weights={name}"])
    assert (config.data.root, config.model.weights) == (name, name)
    assert configure("export", ["adapter=a", "to=peft", f"out={name}"]).out == name
    config = configure("evaluate", ["adapter=a", "+data@sets.photos=imagefolder", f"sets.photos.root={name}"])
    assert config.sets["photos"].root == name
    config = configure("evaluate", ["adapter=a", "+data@sets.my-set=imagefolder", f"++sets.my-set.root={name}"])
    assert config.sets["my-set"].root == name


def test_numbers_are_numbers_and_null_is_none_where_no_text_is_expected():
    words = ["trainer.epochs=1_0", "optim.lr=1e-2", "+model.args={a:1e-6}", "+model.args.b=1.10", "trainer.resume=null"]
    config = configure("train", words)
    assert (config.trainer.epochs, config.optim.lr) == (10, 0.01)
    assert (config.model.args, config.trainer.resume) == ({"a": 1e-6, "b": 1.1}, None)
    assert configure("generate", ["prompt=[a]", "size=512"]).size == (512, 512)


def test_names_in_lists_need_no_quotes_for_hydra():
    config = configure("evaluate", ["adapter=a", "map_images=[café.png, ~/b (1).png]", "prompts=2024_05_01"])
    assert config.map_images == ["café.png", os.path.expanduser("~/b (1).png")]
    assert config.prompts == "2024_05_01"
    assert configure("predict", ["adapter=a", "images=[1.10,true, a.png,7]"]).images == ["1.10", "true", "a.png", "7"]
    with pytest.raises(ConfigError, match="can't read the override"):
        configure("evaluate", ["adapter=a", "map_images=[café.png,]"])


def test_a_sweep_keeps_folders_names(tmp_path):
    words = ["data=imagefolder", "data.root=1.10,1.20", "data.quarantine=1e3", "++hydra.sweep.dir=2024_05_01"]
    command = [sys.executable, "-m", "vislora.train", "-m", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    for root in ("1.10", "1.20"):
        assert f"data.root={root}: there is no such" in done.stderr
    assert (tmp_path / "2024_05_01").is_dir()


def test_a_path_from_the_home_folder_is_found_where_the_shell_leaves_it_alone(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    assert configure("train", ["trainer.resume=~/runs/a"]).trainer.resume == "/home/ada/runs/a"
    several = configure("blend", ["adapter=[~/a,~/b]", "weights=[1,1]", "out=~/c"])
    assert (several.adapter, several.out) == (["/home/ada/a", "/home/ada/b"], "/home/ada/c")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["recipe=vit_cub", "model=embedded,timm", "--multirun"], "vit_base_patch16_224.augreg_in21k"),
        (["recipe=mine", "model=embedded", "--config-dir", "own"], "vit_tiny_patch16_224"),
        (["recipe=on_mine", "model=embedded", "--config-dir", "own"], "vit_tiny_patch16_224"),
    ],
)
def test_an_option_that_a_recipe_would_overrule_is_refused(words, told, tmp_path):
    recipes = tmp_path / "own" / "recipe"
    recipes.mkdir(parents=True)
    mine = "# @package _global_\ndefaults: [{override /model: timm}]\nmodel: {name: vit_tiny_patch16_224}\n"
    (recipes / "mine.yaml").write_text(mine)
    (recipes / "on_mine.yaml").write_text("# @package _global_\ndefaults: [mine]\nseed: 1\n")
    command = [sys.executable, "-m", "vislora.train", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert f"model=embedded means model.name=embedded, over which the recipe puts {told}; add" in done.stderr
    named = [*command, f"model.name={told}", "trainer.resume=nowhere"]
    done = subprocess.run(named, capture_output=True, text=True, cwd=tmp_path)
    assert "trainer.resume=nowhere: there is no such file" in done.stderr


@pytest.mark.parametrize(
    ("name", "word", "message"),
    [
        (
            "train",
            "--epochs",
            "there is no option --epochs; settings are given as key=value: did you mean trainer.epochs=…?",
        ),
        ("train", "--learning-rate=1", "there is no option --learning-rate; .* did you mean optim.lr=…?"),
        ("predict", "--adapter", "there is no option --adapter; .* did you mean adapter=…?"),
        ("train", "--nope", "there is no option --nope; .* --cfg job prints the settings there are"),
    ],
)
def test_an_option_that_there_isnt_is_answered_with_a_setting(name, word, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        command(name, lambda config, out: None, [word, "3"])
    assert stopped.value.code == 2
    assert re.fullmatch(f"vislora: {message}\n".replace("?", r"\?"), capsys.readouterr().err)


def test_only_settings_of_the_command_are_meant():
    with pytest.raises(ConfigError, match="unknown key lr; `--cfg job` prints"):
        configure("predict", ["adapter=x", "images=[a]", "lr=1"])
    with pytest.raises(ConfigError, match=r"unknown key data\.rot; did you mean data\.root\?"):
        configure("evaluate", ["adapter=x", "data=csv", "data.rot=1"])


def test_options_stand_anywhere_among_the_overrides(tmp_path):
    words = ["recipe=vit_birds", "--cfg", "job", "optim.lr=0.125"]
    done = subprocess.run([sys.executable, "-m", "vislora.train", *words], capture_output=True, text=True, cwd=tmp_path)
    assert "lr: 0.125" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "# @package _global_\ntrainer:\n  epoch: 1\n",
            "sets an unknown key trainer.epoch; did you mean trainer.epochs",
        ),
        ("trainer:\n  epochs: 1\n", "has to begin with the line `# @package _global_`"),
        ("defaults:\n  - override /data: csv\n", "overrides data has to begin with the line `# @package _global_`"),
        (
            "# @package _global_\ndefaults:\n  - /data: imagefolder\n",
            "data is chosen already; to change it write data=… without the +, and in a recipe `- override /data: …`",
        ),
        (
            "# @package _global_\noptim: {lr: 1}\ndata: {root: pictures}\n",
            "leave out data=…, or choose one that has it (captions, csv, cub200, imagefolder, metadata, shards, "
            "torchvision), in a recipe by `- override /data: captions`",
        ),
        ("# @package _global_\ndefaults:\n  - vit_brids\n", "recipe=vit_brids is not known; did you mean vit_birds?"),
        ("# @package _global_\ndefaults:\n  - data: csv\n", "a recipe chooses data=csv as `- override /data: csv`"),
        (
            "# @package _global_\ndefaults:\n  - override data: csv\n",
            "a recipe chooses another data with a slash before it: `- override /data: …`",
        ),
        ("# @package _global_\ntrainer: [1\n", "mine.yaml"),
        (
            "# @package _global_\nseed: 1  # größer\n".encode("latin-1"),
            "line 2 of a recipe, or of an option, isn't in UTF-8",
        ),
    ],
)
def test_a_mistake_in_a_recipe_is_answered_with_one_sentence(text, message, tmp_path):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    command = [sys.executable, "-m", "vislora.train", "--config-dir", str(tmp_path), "recipe=mine"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        pytest.param(
            "vit_birds",
            "seed: 1",
            "recipe=vit_birds is vislora's own; give your recipe of that name another one",
            marks=pytest.mark.skipif(_HYDRA >= (1, 4), reason="Hydra 1.4 takes the user's"),
        ),
        ("my-own", "sed: 1", "recipe=my-own sets an unknown key sed; did you mean seed?"),
        (
            "my-own",
            "optim:\n  lr: fast",
            "recipe=my-own sets optim.lr to what can't be there: Value 'fast' of type 'str' could not be converted to "
            "Float",
        ),
    ],
)
def test_a_recipe_may_be_called_anything_but_like_one_that_there_is(name, text, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / f"{name}.yaml").write_text(f"# @package _global_\n{text}\n")
    words = ["train", f"recipe={name}", "--config-dir", str(tmp_path), f"hydra.run.dir={tmp_path / 'run'}"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit):
        command("train", lambda config, out: None)
    assert capsys.readouterr().err == f"vislora: {message}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["to=peft", "weights=w"], "weights=w are for to=merged; to=peft writes the adapter alone"),
        (["pipeline=FluxPipeline"], "pipeline=FluxPipeline is for to=diffusers, kohya or peft"),
        (["out=x.safetensors"], r"out=x\.safetensors: to=merged writes a folder, .*; give a folder's name"),
        (["out=x.safetensors", "to=peft"], r"out=x\.safetensors: to=peft writes a folder, .*; give a folder's name"),
    ],
)
def test_what_an_export_would_make_no_use_of_is_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        configure("export", ["adapter=A", "out=B", *words])


def test_data_of_the_other_kind_is_refused_by_a_command_that_has_no_use_for_it():
    with pytest.raises(ConfigError, match="data=captions is not for this command"):
        configure("evaluate", ["adapter=A", "data=captions", "data.root=x"])


def test_data_settings_survive_json():
    data = BirdsData(species=["mallard", "barn owl"], difficulty=0.25)
    data.augment.crop_scale = 0.5
    assert data_from_dict(to_dict(data)) == data


def test_the_package_lists_its_commands_and_each_tells_its_options(tmp_path):
    def told(*words: str) -> list[str]:
        done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.splitlines()

    calls = told("vislora")
    assert {line.split()[2] for line in calls if line.startswith("python")} == {
        f"vislora.{path.stem}" for path in CONF.glob("*.yaml")
    }
    lines = told("vislora.train", "--help")
    assert lines[0] in calls
    assert "  adapter=dora|full|lora|lora_mlp|lora_qv|pissa|probe|unet_lora" in lines
    assert f"  recipe={'|'.join(sorted(path.stem for path in RECIPES.glob('*.yaml')))}" in lines
    assert not any("schema" in line for line in lines)
    assert not list(tmp_path.iterdir())


_SAYS_A = "from vislora.compose import command; command('resize', lambda config, out: print('a'))"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "words",
    [["-c", _SAYS_A, "adapter=a", "rank=2", "out=b"], ["-m", "vislora.resize", "--help"], ["-m", "vislora"]],
    ids=["command", "help", "list"],
)
def test_a_reader_that_has_enough_ends_a_command_without_a_word(words, unbuffered, tmp_path):
    read, write = os.pipe()
    os.close(read)  # as head does after its lines
    words = [sys.executable, *words]
    env = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=env)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_adapters_in_a_list_may_have_commas_in_quotes():
    config = configure("generate", ["adapter=['st(y)le, é.safetensors', \"b,c\",d]", "prompt=[a]"])
    assert config.adapter.files == ["st(y)le, é.safetensors", "b,c", "d"]


def test_a_second_adapter_beside_the_first_is_refused():
    with pytest.raises(ConfigError, match=r"adapter=a adapter=b: adapter is given twice; .* adapter=\[FOLDER,FOLDER\]"):
        configure("predict", ["adapter=a", "images=[x.png]", "adapter=b"])


@pytest.mark.parametrize("word", ["adapter=", "out=", "adapter=[a,]", "adapter=[a, ,b]", "adapter=[,a]"])
def test_an_empty_path_as_of_an_unset_variable_is_refused(word):
    words = {"adapter": "adapter=[a,b]", "out": "out=c", "weights": "weights=[1,1]"} | {word.partition("=")[0]: word}
    with pytest.raises(ConfigError, match=rf"{re.escape(word)} is empty in one place; give a file or a folder there"):
        configure("blend", [*words.values()])


@pytest.mark.parametrize(("recipe", "folder"), [([], "train"), (["recipe=vit_birds"], "vit_birds")])
def test_a_run_without_a_recipe_has_a_folder_too(recipe, folder, tmp_path, monkeypatch):
    found = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train"])
    command("train", lambda config, out: found.append(out), recipe)
    assert found[0].parent == tmp_path / "runs" / folder


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--multirun", "recipe=vit_birds", "--cfg", "job"], "Only one of --run, --multirun, --cfg, --info"),
        (["recipe=vit_birds", "--resolve"], "--resolve flag can only be used in conjunction with --cfg"),
    ],
)
def test_options_that_exclude_each_other_are_told_in_one_sentence(words, told, capsys):
    with pytest.raises(SystemExit) as stopped:
        command("train", lambda config, out: None, words)
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err


def test_a_fault_of_a_commands_own_is_not_taken_for_one_of_its_words(tmp_path):
    def body(config, out):
        raise ValueError("a fault")

    with pytest.raises(ValueError, match="a fault"):
        command("train", body, [f"hydra.run.dir={tmp_path}", "recipe=vit_birds"])


def test_a_folder_where_a_file_is_expected_is_told_in_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["resize"])
    with pytest.raises(SystemExit) as stopped:
        command("resize", lambda config, out: tmp_path.read_text(), ["adapter=a", "rank=2", "out=b"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"vislora: {tmp_path} can't be used: Is a directory\n"


def test_a_cache_that_can_not_be_used_is_told_with_what_puts_it_elsewhere(tmp_path, monkeypatch, capsys):
    (tmp_path / "cache").write_text("")
    monkeypatch.setenv("VISLORA_CACHE", str(tmp_path / "cache"))
    with pytest.raises(SystemExit):
        command("resize", lambda config, out: (cache_dir() / "a").mkdir(), ["adapter=a", "rank=2", "out=b"])
    told = "can't be used: Not a directory; VISLORA_CACHE=FOLDER puts the cache elsewhere"
    assert capsys.readouterr().err == f"vislora: {tmp_path / 'cache' / 'a'} {told}\n"


def test_a_name_too_long_for_a_file_is_told_in_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["resize"])
    name = "a" * 300
    with pytest.raises(SystemExit) as stopped:
        command("resize", lambda config, out: Path(config.adapter).stat(), [f"adapter={name}", "rank=2", "out=b"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"vislora: {name} can't be used: File name too long\n"


def test_a_list_of_very_many_images_in_one_word_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    images = f"images=[{','.join(f'{i}.png' for i in range(1000))}]"
    monkeypatch.setattr(sys, "argv", ["predict", "adapter=nowhere", images])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(predict.__file__, run_name="__main__")
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("vislora: adapter=nowhere: there is no such")


@pytest.mark.parametrize(
    "words", [["a.png", "--cfg", "job"], ["-c", "job", "a.png"], ["--config-path", str(CONF), "a.png", "-c", "job"]]
)
def test_what_an_option_of_hydra_takes_is_no_picture(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["predict", *words])
    runpy.run_path(predict.__file__, run_name="__main__")
    assert "\nimages:\n- a.png\n" in capsys.readouterr().out


def test_a_picture_that_a_loaders_worker_cant_read_is_told_in_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["resize"])
    loader = DataLoader(Files([tmp_path / "gone.png"]), sampler=[0], batch_size=None, num_workers=1)
    with pytest.raises(SystemExit) as stopped:
        command("resize", lambda config, out: next(iter(loader)), ["adapter=a", "rank=2", "out=b"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"vislora: {tmp_path / 'gone.png'} is missing\n"
