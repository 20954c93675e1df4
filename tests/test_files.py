"""Files are whole or not there, whoever writes them at once."""

import os

from vislora.files import replacing


def test_processes_of_one_number_as_containers_have_them_may_write_a_path_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 1)
    path = tmp_path / "entry"
    with replacing(path) as first, replacing(path) as second:
        first.write_text("whole")
        second.write_text("whole, too")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("entry", "whole")]
