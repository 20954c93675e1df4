"""Self-contained HTML pages: no network, no file beside them, light and dark, readable on a phone.

Text from outside (class names, captions, paths) is escaped here and nowhere else: every function takes plain text, and
gives HTML. Should something slip through, the page's content policy runs no script but its own and loads nothing.
"""

import base64
import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image

from vislora.files import write_text
from vislora.report.figures import INK, PAPER

_WIDEST = 1400  # pixels of an embedded picture


@dataclass(frozen=True)
class Section:
    """A part of a page: its title as plain text, its content as HTML made by this module's functions."""

    title: str
    html: str


def write_page(path: Path, title: str, subtitle: str, sections: Sequence[Section]) -> None:
    """Write a page, atomically."""
    links = "".join(f'<a href="#s{i}">{escape(section.title)}</a>' for i, section in enumerate(sections))
    body = "".join(
        f'<section id="s{i}"><h2>{escape(section.title)}</h2>{section.html}</section>'
        for i, section in enumerate(sections)
    )
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    write_text(
        f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{_STYLE}</style>
</head>
<body>
<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p><nav>{links}</nav></header>
<main>{body}</main>
<script>{_SCRIPT}</script>
</body>
</html>
""",
        path,
    )


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def code(text: str) -> str:
    """A listing, as it is."""
    return f'<pre tabindex="0"><code>{escape(text)}</code></pre>'


def key_figures(figures: Sequence[tuple[str, str, str]]) -> str:
    """Large numbers: (name, value, remark) each."""
    tiles = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(remark)}</small></dd></div>"
        for name, value, remark in figures
    )
    return f'<dl class="tiles">{tiles}</dl>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """A table whose first column names its rows; it scrolls where it is too wide."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    rows_html = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll" tabindex="0"><table>{title}{rows_html}</table></div>'


def details(summary: str, html: str) -> str:
    """Content that is folded away at first."""
    return f"<details><summary>{escape(summary)}</summary>{html}</details>"


def side_by_side(*parts: str) -> str:
    """Figures beside each other where there is room."""
    return f'<div class="grid">{"".join(parts)}</div>'


def drawing(svg: Path, alt: str, wide: bool = False) -> str:
    """A figure of `vislora.report.figures.save`, in the page's colours and letters.

    Args:
        alt: what it shows, for those who don't see it; its caption too.
        wide: scrolls on small screens instead of becoming unreadable.
    """
    text = svg.read_text(encoding="utf-8")
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    own = hashlib.sha256(str(svg).encode()).hexdigest()[:8]

    def placed(tag: re.Match[str]) -> str:
        coloured = tag[0].replace(INK, "currentColor").replace(f"fill: {PAPER}", "fill: none")
        # several drawings share the page: each gets names of its own
        return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{own}-", coloured)

    text = re.sub("<[^>]*>", placed, text)  # between tags are names, of classes called #000000 too
    text = text.replace("<svg ", f'<svg role="img" aria-label="{escape(alt)}" ', 1)
    shape = ' class="scroll" tabindex="0"' if wide else ""
    return f"<figure><div{shape}>{text}</div><figcaption>{escape(alt)}</figcaption></figure>"


def picture(file: Path, alt: str) -> str:
    """An embedded picture with its caption."""
    return f'<figure><img src="{_embedded(file)}" alt="{escape(alt)}"><figcaption>{escape(alt)}</figcaption></figure>'


def slider(before: Path, after: Path, alt: str) -> str:
    """Two pictures of one size over each other, and a handle that uncovers one or the other; the arrow keys move it."""
    return (
        f'<figure><div class="slider"><img src="{_embedded(after)}" alt="{escape(alt)}, after">'
        f'<img class="before" src="{_embedded(before)}" alt="{escape(alt)}, before">'
        f'<input type="range" min="0" max="100" value="50" aria-label="{escape(alt)}: how much of the picture before">'
        "</div>"
        f"<figcaption>{escape(alt)}: before on the left, after on the right</figcaption></figure>"
    )


def _embedded(file: Path) -> str:
    """A data URL; large pictures are scaled down and kept as JPEG where that is smaller."""
    with Image.open(file) as picture:
        rgb = picture.convert("RGB")
    rgb.thumbnail((_WIDEST, 4 * _WIDEST))
    encoded = []
    for form, settings in (("png", {"optimize": True}), ("jpeg", {"quality": 88})):
        buffer = io.BytesIO()
        rgb.save(buffer, form, **settings)
        encoded.append((buffer.getvalue(), form))
    data, form = min(encoded, key=lambda pair: len(pair[0]))
    return f"data:image/{form};base64,{base64.b64encode(data).decode()}"


_SCRIPT = """
for (const range of document.querySelectorAll('.slider input')) {
  const move = () => range.parentElement.style.setProperty('--at', range.value + '%');
  range.addEventListener('input', move);
  move();
}
"""

_STYLE = """
:root{--bg:#fbfaf8;--card:#fff;--ink:#1d2329;--soft:#5d6873;--line:#e3e1dc;--accent:#1f68b3}
@media(prefers-color-scheme:dark){:root{--bg:#14171a;--card:#1c2024;--ink:#e6e8ea;--soft:#9aa5af;--line:#31373d;
--accent:#7db8f0}}
*{box-sizing:border-box}
html{scroll-behavior:smooth;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif}
header,main{max-width:1140px;margin:0 auto;padding:0 20px}
header{padding-top:36px}
h1{font-size:1.9rem;line-height:1.2;letter-spacing:-.02em;margin:0 0 .2em;overflow-wrap:anywhere}
header p{color:var(--soft);margin:0 0 1em;overflow-wrap:anywhere}
nav{display:flex;flex-wrap:wrap;gap:6px 18px;padding:10px 0;border-block:1px solid var(--line);font-size:.92rem}
a{color:var(--accent);text-decoration:none}a:hover{text-decoration:underline}
section{padding:8px 0 4px;scroll-margin-top:12px}
h2{font-size:1.25rem;letter-spacing:-.01em;margin:1.3em 0 .6em}
h3{font-size:1rem;margin:1.2em 0 .4em}
p{max-width:72ch;overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:12px;margin:0 0 16px}
.tiles div{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 14px}
dt{font-size:.8rem;color:var(--soft)}dd{margin:0;font-size:1.5rem;font-variant-numeric:tabular-nums;line-height:1.25;
letter-spacing:-.01em}
dd small{display:block;font-size:.76rem;color:var(--soft);letter-spacing:0;line-height:1.35}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(320px,100%),1fr));gap:16px;align-items:start}
figure{margin:0 0 14px;background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px;min-width:0}
figure svg{display:block;width:100%;height:auto;max-width:720px;margin:0 auto;color:var(--ink)}
figure .scroll{max-height:none}
figure .scroll svg{width:auto;max-width:none}
figure svg text{font-family:inherit!important;fill:currentColor}
figure img{display:block;max-width:100%;height:auto;margin:0 auto;border-radius:4px}
figcaption{font-size:.82rem;color:var(--soft);margin-top:8px}
.scroll+*{margin-top:18px}
.scroll{overflow-x:auto;max-height:80vh;overflow-y:auto}
table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums;width:100%}
caption{text-align:left;color:var(--soft);font-size:.82rem;padding-bottom:6px}
th,td{padding:6px 10px;text-align:right;border-bottom:1px solid var(--line);white-space:pre}
th:first-child{text-align:left;white-space:normal;overflow-wrap:anywhere;min-width:9em}
td{font-size:.76rem;color:var(--soft)}td::first-line{color:var(--ink);font-size:.88rem}
thead th{position:sticky;top:0;background:var(--bg);color:var(--soft);font-weight:600}
tbody th{font-weight:500}
pre{overflow:auto;max-height:70vh;background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px;
font:.8rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
summary{cursor:pointer;color:var(--accent);padding:6px 0}
.slider{position:relative;--at:50%;max-width:720px;margin:0 auto}
.slider img{width:100%;image-rendering:auto}
.slider .before{position:absolute;inset:0;clip-path:inset(0 calc(100% - var(--at)) 0 0)}
.slider::after{content:"";position:absolute;inset-block:0;left:var(--at);width:2px;margin-left:-1px;background:#fff;
box-shadow:0 0 4px #0008;pointer-events:none}
.slider input{position:absolute;inset:0;width:100%;height:100%;margin:0;opacity:0;cursor:ew-resize}
.slider:focus-within{outline:3px solid var(--accent);outline-offset:3px;border-radius:4px}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
@media(prefers-reduced-motion:reduce){html{scroll-behavior:auto}}
@media print{nav{display:none}.scroll{max-height:none}}
"""
