"""What the pages that are one HTML file each share: their style, pictures inlined, tables."""

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from PIL import Image


def write_page(page: str, path: Path) -> None:
    """Writes a page whole or not at all."""
    temporary = path.with_suffix(".partial")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)


def heat(attention: npt.NDArray[np.float32], picture: Image.Image) -> Image.Image:
    """A map [h, w] over the greyed picture; white is the strongest patch, or 4 times the mean.

    So a map that is almost even stays dark, instead of having its noise blown up.
    """
    white = max(float(attention.max()), 4 * float(attention.mean()), 1e-12)
    values = Image.fromarray(attention / white)
    smooth = np.asarray(values.resize(picture.size, Image.Resampling.BICUBIC)).clip(0, 1)
    colours = mpl.colormaps["inferno"](smooth, bytes=True)[..., :3]
    grey = picture.convert("L").convert("RGB")
    return Image.blend(grey, Image.fromarray(colours), 0.65)


def cards(values: Sequence[tuple[str, str, str]]) -> str:
    """Figures at a glance: of each its name, its value, and a note; the value is HTML."""
    return "".join(
        f"<div class=card><span>{html.escape(name)}</span><b>{value}</b><i>{note}</i></div>"
        for name, value, note in values
    )


def grid(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML, such as `jpeg` gives them, under titles that are text."""
    head = "".join(f"<th>{html.escape(title)}</th>" for title in titles)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<div class=scroll><table class=maps><tr>{head}</tr>{body}</table></div>"


def table(values: Mapping[str, Any], changed: Callable[[str, Any], bool] = lambda *_: False) -> str:
    """Names and values in two columns of rows; bold where `changed`."""
    if not values:
        return "<p>Not recorded.</p>"
    rows = []
    for key, value in values.items():
        text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        mark = " class=changed" if changed(key, value) else ""
        rows.append(f"<tr{mark}><th>{html.escape(key)}</th><td>{html.escape(text)}</td></tr>")
    return f"<div class=columns><table>{''.join(rows)}</table></div>"


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested table as one, its names joined by dots."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        name = f"{prefix}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return found


def svg(content: bytes) -> str:
    """A drawing as an inlined picture."""
    return f'<img alt="" src="data:image/svg+xml;base64,{base64.b64encode(content).decode()}">'


def jpeg(picture: Image.Image) -> str:
    """A picture, inlined."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=88)
    return (
        f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
    )


STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #27313b; background: #f6f7f9; margin: 0; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 24px 60px; }
h1 { font-size: 24px; margin: 0; } h2 { font-size: 18px; margin: 36px 0 10px; }
h3 { font-size: 14px; margin: 18px 0 6px; } p { margin: 8px 0; }
.status { color: #66717c; margin: 2px 0 18px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 10px; }
.card { background: #fff; border: 1px solid #e3e7ea; border-radius: 8px; padding: 9px 12px; }
.card span, .card i { display: block; font-size: 12px; color: #66717c; font-style: normal; }
.card b { font-size: 20px; font-variant-numeric: tabular-nums; }
.good, .bad, .over { border-radius: 8px; padding: 9px 13px; }
.good { background: #e9f4ec; } .over { background: #eceff1; }
.bad { background: #fbeae8; border-left: 4px solid #c0392b; }
.wide, .small { display: grid; gap: 10px; margin-bottom: 10px; }
.wide { grid-template-columns: repeat(2, 1fr); } .small { grid-template-columns: repeat(4, 1fr); }
.wide img, .small img { width: 100%; background: #fff; border: 1px solid #e3e7ea;
  border-radius: 8px; padding: 8px; box-sizing: border-box; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; }
.maps th { font-size: 12px; font-weight: 500; color: #66717c; padding: 0 0 3px; }
.maps td { padding: 0 4px 4px 0; } .maps td img { display: block; border-radius: 4px; }
.columns { columns: 2; column-gap: 28px; background: #fff; border: 1px solid #e3e7ea;
  border-radius: 8px; padding: 12px 16px; }
.columns table { width: 100%; font-size: 13px; table-layout: fixed; }
.columns th { text-align: left; font-weight: 400; color: #66717c; width: 55%; }
.columns th, .columns td { padding: 2px 0; vertical-align: top; overflow-wrap: anywhere; }
.changed td, .changed th { font-weight: 600; color: #27313b; }
@media (max-width: 800px) { .wide { grid-template-columns: 1fr; } .columns { columns: 1; }
  .small { grid-template-columns: repeat(2, 1fr); } }
"""
