"""Files are whole or not there, whoever writes them at once."""

import os
from contextlib import contextmanager

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from vislora.files import replacing, write_tensors, write_text
from vislora.models.vit import preprocessing, save_vit


@contextmanager
def full_disk():
    """As good as full: a file takes 64 bytes. Not a fixture: pytest prints its dot before it ends one, and would itself
    meet the limit where its output goes to a file."""
    resource = pytest.importorskip("resource")  # Windows has none
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_a_full_disk_does_not_take_is_named_and_nothing_is_left_of_it(tmp_path):
    path = tmp_path / "file"
    for write in (lambda: write_text("x" * 99, path), lambda: write_tensors({"x": torch.ones(99)}, path)):
        with pytest.raises(OSError, match=rf"File too large: '{path}'"), full_disk():
            write()
    assert not [*tmp_path.iterdir()]


def test_a_folder_that_a_full_disk_does_not_take_is_named_and_no_model_is_left_of_it(tmp_path):
    pytest.importorskip("safetensors", "0.8")  # others leave a part of the file
    model = timm.create_model("test_vit")
    with pytest.raises(OSError, match=rf"File too large: '{tmp_path / 'model'}'"), full_disk():
        save_vit(model, tmp_path / "model", {"preprocessing": preprocessing(model).to_dict()})
    assert [*tmp_path.rglob("*")] == [tmp_path / "model"]


def test_tensors_may_be_read_by_all_that_may_read_other_new_files(tmp_path):
    write_tensors({"x": torch.ones(2)}, tmp_path / "adapter.safetensors")
    model = timm.create_model("test_vit")
    save_vit(model, tmp_path / "model", {"preprocessing": preprocessing(model).to_dict()})
    (tmp_path / "new").touch()
    files = (tmp_path / "adapter.safetensors", tmp_path / "model" / "model.safetensors", tmp_path / "new")
    assert len({file.stat().st_mode for file in files}) == 1


def test_the_same_tensors_and_metadata_are_the_same_bytes(tmp_path):
    tensors = {"a": torch.ones(2), "é": torch.zeros(3, dtype=torch.bfloat16)}
    metadata = {f"key {i}": f'"{i}" \\ é \n\x1f\x7f😀' for i in range(20)}
    for name in ("one", "two"):
        write_tensors(tensors, tmp_path / name, metadata)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    with safe_open(tmp_path / "one", "pt") as file:
        assert file.metadata() == metadata
    assert {name: value.tolist() for name, value in load_file(tmp_path / "one").items()} == {
        "a": [1.0, 1.0],
        "é": [0.0] * 3,
    }


def test_processes_of_one_number_as_containers_have_them_may_write_a_path_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 1)
    path = tmp_path / "entry"
    with replacing(path) as first, replacing(path) as second:
        first.write_text("whole")
        second.write_text("whole, too")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("entry", "whole")]


def test_a_file_is_on_the_disk_before_it_takes_the_place_of_the_old_one(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (fsync(file), done.append(os.fstat(file).st_size)))
    monkeypatch.setattr(os, "replace", lambda part, path: (replace(part, path), done.append(path)))
    write_text("whole", tmp_path / "entry")
    assert done == [len("whole"), tmp_path / "entry"]
