"""python -m vislora.doctor finds every attention family alive, and tells where PEFT's adapters are dead."""

import json
import subprocess
import sys

import pytest

from vislora.compose import configure
from vislora.doctor import doctor, problems, table
from vislora.errors import ConfigError
from vislora.examination import examine
from vislora.structure import look_at, reach
from vislora.targets.families import ATTENTION


def test_architecture_that_is_called_is_sound_here_and_in_peft():
    finding = examine("test_vit")
    assert finding.sound
    assert finding.size == 32
    assert (finding.peft, finding.peft_opens) == ("live", True)


def test_architecture_whose_weights_are_read_is_sound_here_and_dead_in_peft():
    finding = examine("vit_tiny_patch16_dinov3_qkvb")
    assert finding.sound
    assert finding.peft == "dead: 12 of 48 layers"  # qkv in each of 12 blocks
    assert not finding.peft_opens


def test_model_that_cannot_be_run_is_a_finding():
    finding = examine("test_vit.no_such_weights")
    assert not finding.sound
    assert "RuntimeError" in finding.problem
    assert problems([], [finding]) == [f"test_vit.no_such_weights: {finding.problem}"]


def test_error_without_a_word_is_a_finding_too(monkeypatch):
    def asserting(*_, **__):
        raise AssertionError

    monkeypatch.setattr("timm.create_model", asserting)
    assert examine("vit_tiny_patch16_224").problem == "AssertionError: "


def test_structure_names_families_and_projections():
    structure = look_at("botnet26t_256")
    assert structure.families == ("timm.layers.bottleneck_attn.BottleneckAttn",)
    assert structure.projections == ("q", "k", "v")
    assert structure.problem is None
    assert look_at("resnet18").families == ()


def test_graph_on_the_meta_device_tells_what_gradients_reach_here_and_in_peft():
    assert reach("test_vit").problem is None
    assert reach("test_vit").peft == "live"
    read = reach("vit_tiny_patch16_dinov3_qkvb")
    assert (read.problem, read.peft) == (None, "dead")


def test_architectures_that_differ_in_size_alone_have_one_layout():
    layouts = {name: look_at(name).layout for name in ("vit_tiny_patch16_224", "vit_large_patch16_384", "test_vit3")}
    assert layouts["vit_tiny_patch16_224"] == layouts["vit_large_patch16_384"] != layouts["test_vit3"]


@pytest.mark.slow
def test_command_prints_one_row_for_each_family(tmp_path):
    words = ["models=test_vit*", "workers=0", f"hydra.run.dir={tmp_path}"]
    run = subprocess.run([sys.executable, "-m", "vislora.doctor", *words], capture_output=True, text=True, check=True)
    rows = [line.split() for line in run.stdout.splitlines()]
    assert [row[0] for row in rows[1:4]] == [
        "layers.attention.Attention",
        "layers.attention_pool.AttentionPoolLatent",
        "models.vision_transformer_relpos.RelPosAttention",
    ]
    assert rows[4][:2] == ["3", "classes"]
    written = json.loads((tmp_path / "doctor.json").read_text())
    assert rows[4][2:6] == ["5", "5", "live", "5"]
    assert len(written["findings"]) == int(rows[4][6])
    assert all(finding["merged"] for finding in written["findings"])


def test_models_of_other_than_square_pictures_are_examined_too():
    structures, _ = doctor(configure("doctor", ["models=*sapiens2*", "real=0", "workers=0"]))
    assert structures
    assert problems(structures, []) == []


def test_pattern_without_attention_is_refused():
    with pytest.raises(ConfigError, match=r"models=resnet18: timm has 1 such models, none of them with attention"):
        doctor(configure("doctor", ["models=resnet18", "workers=0"]))


@pytest.mark.slow
def test_every_attention_architecture_of_timm_is_alive():
    structures, findings = doctor(configure("doctor"))
    print(table(structures, findings))
    assert problems(structures, findings) == []
    assert len(structures) > 640
    rows = {name for name in ATTENTION if name.startswith("timm.")}
    optional = {  # in timm, but in no architecture that it registers
        "timm.layers.attention2d.Attention2d",
        "timm.layers.attention_pool2d.RotAttentionPool2d",
        "timm.layers.non_local_attn.NonLocalAttn",
        "timm.models.mvitv2.MultiScaleAttentionPoolFirst",
    }
    assert {family for structure in structures for family in structure.families} == rows - optional
    # what the graph of a layout tells of PEFT is what the gradients of a model with weights say
    kinds = {structure.name: (structure.peft or "").partition(":")[0] for structure in structures}
    assert {f.name: (f.peft or "").partition(":")[0] for f in findings} == {f.name: kinds[f.name] for f in findings}
    assert {"beit_base_patch16_224", "swinv2_tiny_window8_256", "vit_tiny_patch16_dinov3_qkvb"} <= {
        name for name, kind in kinds.items() if kind == "dead"
    }
