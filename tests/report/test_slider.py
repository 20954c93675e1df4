"""The slider between two pictures in a real browser, moved by a real keyboard's keys."""

import itertools
import json
import os
import shutil
import subprocess
import time

import numpy as np
import pytest
from PIL import Image

from vislora.report.before_after import write_pairs
from vislora.report.page import write_page
from vislora.report.sections import before_and_after

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = "<img src=x onerror=\"document.title='broken'\"> a/../blue jay"


class Browser:
    """A headless Chromium, spoken to through pipes in the DevTools protocol."""

    def __init__(self, profile):
        to_read, self._to = os.pipe()
        self._from, to_write = os.pipe()
        words = (
            f"--headless --no-sandbox --disable-gpu --no-first-run --remote-debugging-pipe --user-data-dir={profile}"
        )
        script = f'exec "$0" {words} about:blank 3<&{to_read} 4>&{to_write}'
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(["bash", "-c", script, CHROMIUM], pass_fds=(to_read, to_write), **quiet)
        os.close(to_read)
        os.close(to_write)
        self._numbers, self._rest, self._session = itertools.count(1), b"", None

    def call(self, method, **parameters):
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                part = os.read(self._from, 65536)
                assert part, "the browser is gone"
                self._rest += part
            answer, _, self._rest = self._rest.partition(b"\0")
            answer = json.loads(answer)
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, path):
        target = self.call("Target.createTarget", url=path.as_uri())["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        while self.value("location.href + document.readyState") != f"{path.as_uri()}complete":
            time.sleep(0.05)

    def value(self, expression):
        return self.call("Runtime.evaluate", expression=expression)["result"].get("value")

    def press(self, key, code):
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def close(self):
        self.call("Browser.close")
        self._process.wait(timeout=60)
        os.close(self._to)
        os.close(self._from)


def pair(value):
    return Image.fromarray(np.full((64, 64, 3), value, np.uint8))


@pytest.fixture
def page(tmp_path):
    write_pairs([HOSTILE, "a barn owl"], [pair(0)] * 2, [pair(255)] * 2, tmp_path)
    write_page(tmp_path / "report.html", "A report", "", [before_and_after(tmp_path)])
    return tmp_path / "report.html"


def test_a_caption_reaches_the_page_as_text_and_no_file_as_a_path(page):
    names = sorted(file.name for file in (page.parent / "before_after").glob("*.png"))
    assert names[0] == "01_img_src_x_onerror_document.title_broken_a_.._blue_jay.after.png"
    assert len(names) == 4
    assert HOSTILE not in page.read_text()
    assert "&lt;img src=x" in page.read_text()


@pytest.fixture
def browser(tmp_path):
    browser = Browser(tmp_path / "profile")
    yield browser
    browser.close()


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")
def test_tab_reaches_the_slider_and_the_arrow_keys_move_it(page, browser):
    browser.open(page)
    shown = "getComputedStyle(document.querySelector('.slider .before')).clipPath"
    assert browser.value("document.title") == "A report"
    for _ in range(20):
        browser.press("Tab", 9)
        if browser.value("document.activeElement.type") == "range":
            break
    assert "a barn owl" not in browser.value("document.activeElement.ariaLabel")  # the first of two
    before, start = browser.value(shown), browser.value("document.activeElement.value")
    browser.press("ArrowRight", 39)
    browser.press("ArrowRight", 39)
    assert browser.value("document.activeElement.value") == str(int(start) + 2) == "52"
    assert browser.value("document.activeElement.parentElement.style.getPropertyValue('--at')") == "52%"
    assert browser.value(shown) != before
    browser.press("Home", 36)
    assert browser.value("document.activeElement.value") == "0"
    assert browser.value("document.querySelectorAll('.slider input')[1].value") == "50"
