"""Where the cache is."""

import os

import pytest

from vislora.errors import ConfigError
from vislora.paths import cache_dir


def test_a_user_without_a_home_is_told_where_the_cache_can_be(monkeypatch):
    monkeypatch.delenv("VISLORA_CACHE", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 9)  # a container's, whom no file names
    with pytest.raises(ConfigError, match="no home folder for the cache; set VISLORA_CACHE=FOLDER"):
        cache_dir()
