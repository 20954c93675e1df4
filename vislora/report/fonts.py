"""Fonts for names and prompts in scripts that matplotlib's own font lacks, where the system has one."""

from pathlib import Path

import matplotlib
from matplotlib.font_manager import findfont, fontManager, get_font
from PIL import ImageFont

_OWN = str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")  # Pillow's has no arrows either
# with Chinese, Japanese and Korean; as Linux, macOS and Windows have them
_OTHERS = ("Noto Sans CJK JP", "Noto Sans CJK SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Droid Sans Fallback")
_OTHERS += ("Arial Unicode MS", "Hiragino Sans GB", "Apple SD Gothic Neo", "Microsoft YaHei", "Malgun Gothic")


def installed() -> list[str]:
    """Families to turn to for letters that the usual one lacks; of any other, matplotlib would warn."""
    there = set(fontManager.get_font_names())
    return [name for name in _OTHERS if name in there]


def font_of(text: str, size: int) -> ImageFont.FreeTypeFont:
    """The first font that has all letters of a text, since Pillow takes them all from one."""
    letters = {ord(letter) for letter in text if not letter.isspace()}
    files = [_OWN, *map(findfont, installed())]
    fitting = (file for file in files if all(map(get_font(file).get_char_index, letters)))
    return ImageFont.truetype(next(fitting, _OWN), size)
