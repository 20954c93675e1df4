"""What a stranger gets: the wheel, the embedded model, and a README that is true."""

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

from vislora.compose import configure
from vislora.generate import _quoted

ROOT = Path(__file__).resolve().parent.parent


def run(words, cwd, **environment):
    done = subprocess.run(words, capture_output=True, text=True, cwd=cwd, env=os.environ | environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_an_installed_wheel_runs_a_recipe_from_an_empty_folder(tmp_path):
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)], tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel)], tmp_path)
    where = run([sys.executable, "-c", "import vislora.paths; print(vislora.paths.CONF)"], empty, PYTHONPATH=str(site))
    assert where.strip() == str(site / "vislora" / "conf")
    words = ["recipe=vit_birds", "data.species=[mallard,barn owl]", "data.test_per_species=5", "trainer.epochs=1"]
    printed = run([sys.executable, "-m", "vislora.train", *words], empty, PYTHONPATH=str(site))
    assert "top-1" in printed
    assert (next((empty / "runs" / "vit_birds").iterdir()) / "adapter" / "adapter_model.safetensors").is_file()


def test_importing_the_package_and_its_configuration_is_cheap():
    heavy = "import sys, vislora, vislora.compose, vislora.train; print(sorted({'torch', 'timm'} & set(sys.modules)))"
    assert run([sys.executable, "-c", heavy], ROOT).strip() == "[]"


def test_a_training_imports_what_scores_it_after_the_last_step():
    heavy = "import sys, vislora.tasks.recognition; print(sorted({'torchmetrics', 'scipy'} & set(sys.modules)))"
    assert run([sys.executable, "-c", heavy], ROOT).strip() == "[]"


def test_the_pipelines_text_encoder_is_named_as_every_release_of_transformers_reads_it():
    """Before transformers 5.6 CLIP has a level `text_model`; without it in the file, its weights would be random."""
    with safe_open(ROOT / "assets" / "sd_birds" / "text_encoder" / "model.safetensors", "pt") as file:
        assert all(name.startswith("text_model.") for name in file.keys())  # noqa: SIM118, a file is no dict


LAYERS = {  # what each part may import of the package, besides itself and what stands at the bottom
    "lora": set(),
    "targets": {"lora"},
    "metrics": {"lora"},
    "models": {"data", "formats", "lora", "targets"},
    "data": {"precision"},
    "formats": {"lora", "targets"},
    "objectives": {"data"},
    "report": {"data", "metrics"},
}
BOTTOM = {"config", "errors", "files", "hub", "names", "paths"}


def test_the_parts_import_downwards_alone():
    for part, below in LAYERS.items():
        for path in (ROOT / "vislora" / part).rglob("*.py"):
            names = set()
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    names |= {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.level == 0:  # relative ones stay within their part
                    whole = node.module == "vislora"
                    names |= {f"vislora.{alias.name}" for alias in node.names} if whole else {node.module}
            inner = {name.split(".")[1] for name in names if name.startswith("vislora.")} - {"__version__"}
            assert inner <= {part, *below, *BOTTOM}, f"{path.relative_to(ROOT)} imports {inner}"


def test_the_core_imports_nothing_but_torch():
    for path in (ROOT / "vislora" / "lora").glob("*.py"):
        for package in re.findall(r"^(?:from|import) (\w+)", path.read_text(), re.MULTILINE):
            assert package in {"torch", "vislora", *sys.stdlib_module_names}, f"{path.name} imports {package}"
        for inner in re.findall(r"^from vislora\.(\w+)", path.read_text(), re.MULTILINE):
            assert inner in {"lora", "errors"}, f"{path.name} imports vislora.{inner}"


def test_every_command_and_file_the_readme_names_exists():
    text = (ROOT / "README.md").read_text()
    for module in set(re.findall(r"python -m (vislora\.\w+)", text)):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module
    for path in set(re.findall(r"\]\(([\w./-]+)\)", text)) | set(
        re.findall(r"python ((?:benchmarks|assets)/\S+\.py)", text)
    ):
        assert (ROOT / path).exists(), path


def test_every_setting_in_a_command_of_the_readme_is_one():
    blocks = re.findall(r"```bash\n(.+?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("python -m vislora.")]
    assert len(commands) > 10
    for _, _, module, *words in commands:
        given = [_quoted(word) for word in words if "=" in word and not word.startswith(("hydra.", "hydra/"))]
        if "--multirun" in words:  # the first value of each search
            given = [re.sub(r"=(?:tag\(\w+,)?(?:choice|interval)\(([^,]+),.*", r"=\1", word) for word in given]
        if module == "vislora.predict":  # whose other words are pictures
            given.append("images=[bird.jpg]")
        configure(module.removeprefix("vislora."), given)


def test_the_example_of_an_attention_class_runs(tmp_path):
    (example,) = re.findall(r"```python\n(.+?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)
    run([sys.executable, "-c", example], tmp_path)


def test_every_path_that_the_documents_name_exists():
    for document in (ROOT / "docs").glob("*.md"):
        for path in re.findall(r"`((?:vislora|conf|recipes|benchmarks)/[\w/.]+)`", document.read_text()):
            assert (ROOT / path).exists(), f"{document.name}: {path}"


@pytest.mark.slow
def test_the_readmes_python_example_runs(tmp_path):
    text = (ROOT / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.+?)```", text, re.DOTALL)
    quick = example.replace('"recipe=vit_birds"', '"recipe=vit_birds", "trainer.epochs=1", "data.test_per_species=2"')
    assert quick != example
    Image.new("RGB", (90, 60), "red").save(tmp_path / "bird.jpg")
    run([sys.executable, "-c", quick], tmp_path)
