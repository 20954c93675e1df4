"""Where the cache is."""

import os
from pathlib import Path

import pytest

from vislora.errors import ConfigError
from vislora.paths import cache_dir, user_path


def test_a_user_without_a_home_is_told_where_the_cache_can_be(monkeypatch):
    monkeypatch.delenv("VISLORA_CACHE", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 9)  # a container's, whom no file names
    with pytest.raises(ConfigError, match="no home folder for the cache; set VISLORA_CACHE=FOLDER"):
        cache_dir()


def test_a_home_folder_is_found_and_one_of_nobody_is_a_name_like_others(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert user_path("~/birds") == user_path(Path("~/birds")) == Path("/home/someone/birds")
    assert user_path("~no.such.user/birds") == Path("~no.such.user/birds")
