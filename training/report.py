"""A run at a glance: one HTML file with its curves, alarms, settings and attention maps.

    python -m training.report RUN_DIR

writes RUN_DIR/report.html, which needs no other file. A run draws it itself every
`report.every_epochs` epochs.
"""

import argparse
import html
import json
import math
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from training.attention_maps import Film, read_film
from training.config import Data, Recipe, recipe_to_dict
from training.curves import BLUE, GREEN, GREY, INK, ORANGE, RED, Line, Values, loss_panel, panel
from training.monitors import COLUMNS
from training.page import STYLE, cards, flat, grid, heat, jpeg, svg, table, write_page
from training.rows import read_rows

_MOMENTS = 7  # columns of the attention maps over time
_TILE = 132  # side in pixels of an attention map


class ReportError(ValueError):
    """A folder that holds no run to report on."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 2 for a folder that holds no run."""
    parser = argparse.ArgumentParser(prog="python -m training.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run_dir", type=Path)
    try:
        print(write_report(parser.parse_args(arguments).run_dir))
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def write_report(run_dir: Path) -> Path:
    """Writes `report.html` in the run's folder, whole or not at all; returns its path.

    Raises:
        ReportError: no log.csv with a row, or no recipe.json.
    """
    rows, settings = read_rows(run_dir / "log.csv"), _json(run_dir / "recipe.json")
    if not rows or not settings:
        raise ReportError(f"{str(run_dir)!r} holds no run: log.csv needs a row, and recipe.json")
    columns = _columns(rows, COLUMNS)
    knn = read_rows(run_dir / "knn.csv")
    alarms = run_dir / "alarms.log"
    said = alarms.read_text(encoding="utf-8").splitlines() if alarms.exists() else []
    marks = [int(line.split(":")[0].removeprefix("step ")) for line in said if ": ALARM: " in line]
    page = _PAGE.format(
        style=STYLE,
        title=html.escape(run_dir.resolve().name),
        status=_status(columns),
        cards=_cards(columns, knn, settings),
        alarms=_alarms(said),
        curves=_curves(columns, knn, settings, marks),
        attention=_attention(read_film(run_dir)),
        recipe=_recipe(settings),
        environment=table(_json(run_dir / "environment.json")),
    )
    path = run_dir / "report.html"
    write_page(page, path)
    return path


def _status(columns: Mapping[str, Values]) -> str:
    step, epoch, left = (int(columns["step"][-1]), int(columns["epoch"][-1]), columns["eta_s"][-1])
    if left == 0:
        return f"finished: {step:,} steps, {epoch + 1} epochs"
    known = f", about {timedelta(seconds=round(left))} to go" if math.isfinite(left) else ""
    return f"step {step:,}, in epoch {epoch + 1}{known}"


def _cards(
    columns: Mapping[str, Values], knn: Sequence[Mapping[str, str]], settings: Mapping[str, Any]
) -> str:
    """The newest figures."""
    last = {name: values[-1] for name, values in columns.items()}
    ceiling = math.log(settings["head"]["out_dim"])
    figures = [
        ("loss", f"{last['loss']:.3f}", "nats"),
        ("teacher entropy", f"{last['teacher_entropy']:.3f}", f"of ln K = {ceiling:.2f}"),
        ("KL", f"{last['kl']:.3f}", "near 0: collapse"),
        ("agreement", _percent(last["agreement"]), "of teacher and student"),
    ]
    figures += [
        (f"k-NN, {row['network']}", f"{float(row['top1']):.1f} %", "top-1")
        for row in knn
        if row["step"] == knn[-1]["step"]
    ]
    figures += [
        ("speed", f"{last['images_per_s']:,.0f}", "images/s"),
        ("data wait", _percent(last["data_wait_share"]), "of the time"),
        ("memory", _number(last["memory_mib"] / 1024, ".1f"), "GiB at most"),
        ("skipped steps", _number(last["skipped_steps"], ".0f"), "not finite"),
        ("bad pictures", _number(last["bad_pictures"], ".0f"), "replaced by others"),
    ]
    return cards(figures)


def _alarms(said: Sequence[str]) -> str:
    """Every line of alarms.log, in red the alarms that nothing has cleared since."""
    if not said:
        return "<p class=good>No alarm: no sign of collapse so far.</p>"
    lasting: dict[str, int] = {}
    for i, line in enumerate(said):
        _, kind, rest = line.split(": ", 2)
        name = rest.split(" (")[0]
        if kind == "ALARM":
            lasting[name] = i
        else:
            lasting.pop(name, None)
    return "".join(
        f"<p class={'bad' if i in lasting.values() else 'over'}>{html.escape(line)}</p>"
        for i, line in enumerate(said)
    )


def _curves(
    columns: Mapping[str, Values],
    knn: Sequence[Mapping[str, str]],
    settings: Mapping[str, Any],
    marks: Sequence[int],
) -> str:
    def line(name: str, color: str = BLUE, scale: float = 1.0, label: str = "") -> Line:
        return Line(columns["step"], columns[name] * scale, label=label, color=color)

    wide: list[bytes | None] = [
        loss_panel(columns, math.log(settings["head"]["out_dim"]), marks),
        panel("KL(teacher, student) (nats); near 0: collapse", [line("kl", ORANGE)], marks=marks),
        panel("k-NN accuracy (%)", _knn_lines(knn)),
        panel("Teacher-student agreement (%)", [line("agreement", GREEN, 100)], top=100),
        panel("Gradient norm, before clipping", [line("gradient_norm")], log=True),
        panel("Norm of the centre", [line("center_norm")]),
    ]
    small = [
        panel("Learning rate", [line("lr", INK)], wide=False),
        panel("Weight decay", [line("weight_decay", INK)], wide=False),
        panel("Teacher momentum", [line("teacher_momentum", INK)], wide=False, from_zero=False),
        panel("Teacher temperature", [line("teacher_temperature", INK)], wide=False),
        panel("Images/s", [line("images_per_s", GREEN)], wide=False),
        panel("Data wait (%)", [line("data_wait_share", ORANGE, 100)], wide=False, top=100),
        panel("Memory (GiB)", [line("memory_mib", BLUE, 1 / 1024)], wide=False),
        panel(
            "Skipped, bad (count)",
            [line("skipped_steps", RED, 1, "steps"), line("bad_pictures", GREY, 1, "pictures")],
            wide=False,
        ),
    ]
    note = (
        "" if knn else "<p>No k-NN curve: set <code>knn.train</code> and <code>knn.val</code>.</p>"
    )
    return (
        f"<div class=wide>{''.join(map(svg, filter(None, wide)))}</div>{note}"
        f"<div class=small>{''.join(map(svg, filter(None, small)))}</div>"
    )


def _knn_lines(knn: Sequence[Mapping[str, str]]) -> list[Line]:
    lines = []
    for network, color in (("teacher", BLUE), ("student", ORANGE)):
        found = _columns(
            [row for row in knn if row["network"] == network], ("step", "top1", "top5")
        )
        for score, words in (("top1", "top-1"), ("top5", "top-5")):
            label, dashed = f"{network}, {words}", score == "top5"
            lines.append(
                Line(found["step"], found[score], label, color, dashed=dashed, points=True)
            )
    return lines


def _attention(film: Film | None) -> str:
    """Two tables: the mean of the heads over time, and the last maps' heads."""
    if film is None:
        return (
            "<p>No attention maps: they are of ViTs alone, and <code>report.pictures</code> says "
            "of how many pictures.</p>"
        )
    last = len(film.steps) - 1
    moments = sorted({round(i * last / (_MOMENTS - 1)) for i in range(_MOMENTS)})
    heads = film.maps.shape[2]
    titles = [
        f"epoch {film.epochs[t] + 1}, step {film.steps[t]:,}" if film.steps[t] else "untrained"
        for t in moments
    ]
    over_time, each_head = [], []
    for p, picture in enumerate(film.pictures[: film.maps.shape[1]]):
        shown = picture.resize((_TILE, _TILE), Image.Resampling.BICUBIC)
        means = [heat(film.maps[t, p].mean(axis=0), shown) for t in moments]
        of_heads = [heat(film.maps[last, p, h], shown) for h in range(heads)]
        over_time.append([jpeg(each) for each in (shown, *means)])
        each_head.append([jpeg(each) for each in (shown, *of_heads)])
    names = [f"head {h + 1}" for h in range(heads)]
    return (
        "<h3>Mean of the heads, over time</h3>"
        + grid(["picture", *titles], over_time)
        + f"<h3>Each head, after step {film.steps[last]:,}</h3>"
        + grid(["picture", *names], each_head)
    )


def _recipe(settings: Mapping[str, Any]) -> str:
    """Every key; bold where it is not the default."""
    defaults = flat(recipe_to_dict(Recipe(data=Data(train=("-",)))))
    return table(flat(settings), changed=lambda key, value: defaults.get(key) != value)


def _columns(rows: Sequence[Mapping[str, str]], names: Sequence[str]) -> dict[str, Values]:
    """Columns as numbers, NaN where there is no value."""
    return {
        name: np.array([float(row.get(name) or "nan") for row in rows], dtype=np.float64)
        for name in names
    }


def _percent(share: float) -> str:
    return _number(100 * share, ".0f") + (" %" if math.isfinite(share) else "")


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "-"


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width"><style>{style}</style>
<main>
<h1>{title}</h1><p class=status>{status}</p>
<div class=cards>{cards}</div>
<h2>Alarms</h2>{alarms}
<h2>Curves</h2>{curves}
<h2>Attention of the teacher</h2>{attention}
<h2>Recipe</h2><p>Bold: other than the default.</p>{recipe}
<h2>Environment</h2>{environment}
</main></html>
"""


if __name__ == "__main__":
    sys.exit(main())
