"""The page of `python -m training.evaluation report`, from what was found."""

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from backbone.pretrained import NamedModel
from training.curves import matrix
from training.evaluation.command import describe_model
from training.evaluation.confusion import most_confused
from training.evaluation.report_parts import Attention, Confusion, Neighbour, Part
from training.page import STYLE, cards, flat, grid, heat, jpeg, svg, table, write_page

_TILE = 150  # the long side in pixels of a picture
_PAIRS = 12  # of classes that are confused
_TOLD = frozenset({"evaluation", "model", "fingerprint", "architecture", "preprocess"})


def write(
    model: NamedModel,
    evaluations: Mapping[str, Part[dict[str, Any]]],
    attention: Part[list[Attention] | None],
    confusion: Part[Confusion | None],
    path: Path,
) -> None:
    """Writes the page, whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    page = _PAGE.format(
        style=STYLE + _STYLE,
        title=html.escape(f"{model.name}: evaluations"),
        status=html.escape(
            f"{model.artifact.architecture.name}, fingerprint {model.artifact.fingerprint}"
        ),
        card=_card(model),
        cards=cards(_headlines(evaluations)),
        figures="".join(map(_figures, evaluations.values())),
        attention=_failed(attention) or _attention(attention.found),
        neighbours=_failed(confusion) or _neighbours(confusion.found),
        confusion=_failed(confusion) or _confusion(confusion.found),
    )
    write_page(page, path)


def _card(model: NamedModel) -> str:
    """What the model is and what was measured when it was made; how it was made, folded away."""
    made = model.artifact.provenance
    plain = {key: value for key, value in made.items() if not isinstance(value, Mapping)}
    short = {**describe_model(model), "made": plain, "quality": dict(model.artifact.quality)}
    rest = {key: value for key, value in made.items() if key not in plain}
    return _told(short) + (_folded("how it was made", rest) if rest else "")


def _headlines(evaluations: Mapping[str, Part[dict[str, Any]]]) -> list[tuple[str, str, str]]:
    """The figures that a contract fixes; the others stand in their tables."""
    found = []
    for part in evaluations.values():
        figures = part.found or {}
        if ks := figures.get("knn"):
            k = max(ks, key=lambda k: float(ks[k]["top1"]))
            found.append(("k-NN, top-1", f"{ks[k]['top1']:.1f} %", f"k = {html.escape(k)}"))
        if "jaccard_best_head" in figures:
            for key, note in (("jaccard_best_head", "best head"), ("jaccard_mean", "mean head")):
                found.append((part.name.replace("_", " "), f"{100 * figures[key]:.1f} %", note))
    return found


def _figures(part: Part[dict[str, Any]]) -> str:
    """What a command printed, and all of its figures and settings folded away."""
    title = f"<h3>{html.escape(part.name)}</h3>"
    if part.found is None:
        return title + _failed(part)
    every = {key: value for key, value in part.found.items() if key not in _TOLD}
    folded = _folded("every figure, protocol, data", every)
    return f"{title}<pre>{html.escape(part.table)}</pre>{folded}"


def _failed(part: Part[Any]) -> str:
    if part.error is None:
        return ""
    return f"<p class=bad>{html.escape(part.name)} failed: {html.escape(part.error)}</p>"


def _attention(found: Sequence[Attention] | None) -> str:
    """Rows of a picture, the mean of its heads, and each head."""
    if not found:
        return "<p>No attention maps: they need pictures, and a ViT.</p>"
    rows = []
    for each in found:
        shown = _tile(each.picture)
        maps = [each.maps.mean(axis=0), *each.maps]
        rows.append([jpeg(tile) for tile in (shown, *(heat(one, shown) for one in maps))])
    heads = [f"head {head}" for head in range(len(found[0].maps))]
    return grid(["picture", "mean of the heads", *heads], rows)


def _neighbours(found: Confusion | None) -> str:
    if found is None:
        return "<p>No neighbours: they need <code>--train</code> and <code>--val</code>.</p>"
    rows = [[_neighbour(row.query), *map(_neighbour, row.neighbours)] for row in found.rows]
    most = max(len(row.neighbours) for row in found.rows)
    return (
        f"<p>Random queries, framed green where the k-NN (k = {found.k}) is right, and their "
        "nearest pictures, framed green where they are of the query's class.</p>"
        + grid(["query", *(f"{n + 1}." for n in range(most))], rows)
    )


def _neighbour(tile: Neighbour) -> str:
    words = tile.label if tile.similarity is None else f"{tile.label} {tile.similarity:.2f}"
    mark = "right" if tile.right else "wrong"
    sign = "✓" if tile.right else "✗"
    return (
        f"<figure class={mark}>{jpeg(_tile(tile.picture))}"
        f"<figcaption>{sign} {html.escape(words)}</figcaption></figure>"
    )


def _confusion(found: Confusion | None) -> str:
    """The matrix as a drawing, and its largest entries beside the diagonal."""
    if found is None:
        return "<p>No confusion: it needs <code>--train</code> and <code>--val</code>.</p>"
    counts = found.matrix.double()
    shares = 100 * counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    drawing = svg(matrix("Taken for (% of a class)", shares.numpy(), found.classes))
    right = 100 * counts.diagonal().sum().item() / counts.sum().item()
    lines = "".join(
        f"<tr><td>{html.escape(found.classes[each.truth])}</td>"
        f"<td>{html.escape(found.classes[each.taken_for])}</td>"
        f"<td>{each.times} of {each.of}</td></tr>"
        for each in most_confused(found.matrix, _PAIRS)
    )
    return (
        f"<p>k = {found.k}: {right:.2f} % of {int(counts.sum()):,} right.</p>"
        f"<div class=wide>{drawing}<table class=pairs><tr><th>class</th><th>taken for</th>"
        f"<th>times</th></tr>{lines}</table></div>"
    )


def _tile(picture: Image.Image) -> Image.Image:
    scale = _TILE / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def _folded(title: str, values: Mapping[str, Any]) -> str:
    return f"<details><summary>{title}</summary>{_told(values)}</details>"


def _told(values: Mapping[str, Any]) -> str:
    return table(
        {
            key: value if isinstance(value, str) else json.dumps(value)
            for key, value in flat(values).items()
        }
    )


_STYLE = """
pre { background: #fff; border: 1px solid #e3e7ea; border-radius: 8px; padding: 10px 14px;
  overflow-x: auto; font-size: 13px; margin: 0 0 6px; }
summary { cursor: pointer; color: #66717c; font-size: 13px; margin: 4px 0 10px; }
figure { margin: 0; }
figcaption { font-size: 12px; max-width: 150px; overflow-wrap: anywhere; }
.maps td { vertical-align: top; }
.right img { outline: 3px solid #3b8f5a; outline-offset: -3px; }
.wrong img { outline: 3px solid #c0392b; outline-offset: -3px; }
.right figcaption { color: #2b6e44; } .wrong figcaption { color: #a33226; }
.pairs { font-size: 13px; align-self: start; } .pairs td, .pairs th { padding: 3px 14px 3px 0;
  text-align: left; overflow-wrap: anywhere; }
"""

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width"><style>{style}</style>
<main>
<h1>{title}</h1><p class=status>{status}</p>
{card}
<div class=cards>{cards}</div>
<h2>Figures</h2>{figures}
<h2>Attention</h2>{attention}
<h2>Nearest neighbours</h2>{neighbours}
<h2>Confusion of the k-NN</h2>{confusion}
</main></html>
"""
