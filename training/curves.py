"""Figures as curves and matrices: SVG, drawn for reports."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

Values = npt.NDArray[np.float64]

INK, GREY, RED = "#27313b", "#8a949e", "#c0392b"
BLUE, ORANGE, GREEN = "#2f6db3", "#d98324", "#3b8f5a"
_NAMES = 30  # that can be read along an axis
_BUCKETS = 300  # of which a long run's curve consists
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": "#c5ccd3",
    "axes.labelcolor": GREY,
    "axes.titlecolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "grid.color": "#e8ecef",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.fonttype": "path",
    "svg.hashsalt": "dinoscope",
}


@dataclass(frozen=True)
class Line:
    """One curve of a panel: `y` after the steps `x`, both [n]."""

    x: Values
    y: Values
    label: str = ""
    color: str = BLUE
    dashed: bool = False
    points: bool = False


def panel(
    title: str,
    lines: Sequence[Line],
    *,
    wide: bool = True,
    log: bool = False,
    from_zero: bool = True,
    top: float | None = None,
    marks: Sequence[int] = (),
) -> bytes | None:
    """A small picture of one or more curves over the steps, as SVG; None where nothing is known.

    Args:
        title: with the unit.
        wide: half of the page's width, else a quarter.
        log: a logarithmic scale.
        from_zero: whether a linear scale starts at 0.
        top: a linear scale's end.
        marks: steps that get a red line: alarms.
    """
    if not any(np.isfinite(line.y).any() for line in lines):
        return None
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(title, wide)
        for line in lines:
            _draw(axes, line)
        if log and any((line.y > 0).any() for line in lines):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(_plain)
        elif from_zero:
            empty = top is None and not any((line.y > 0).any() for line in lines)
            axes.set_ylim(bottom=0, top=1 if empty else top)
        _mark(axes, marks)
        if any(line.label for line in lines):
            axes.legend(loc="best", ncols=2, handlelength=2.6)
        return _svg(figure)


def loss_panel(columns: Mapping[str, Values], ceiling: float, marks: Sequence[int]) -> bytes:
    """The loss as teacher entropy with KL on top of it, under the line of ln K, as SVG.

    Args:
        columns: of the log: `step`, `loss`, `teacher_entropy`, `kl`.
        ceiling: ln K.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _axes("Loss = teacher entropy + KL (nats)", wide=True)
        x, entropy, _ = _buckets(columns["step"], columns["teacher_entropy"])
        _, loss, _ = _buckets(columns["step"], columns["loss"])
        if len(x) == 1:  # areas and lines of one point cannot be seen
            x, entropy, loss = x + np.array([-0.5, 0.5]), entropy.repeat(2), loss.repeat(2)
        axes.fill_between(x, 0, entropy, color=BLUE, alpha=0.22, lw=0, label="teacher entropy")
        axes.fill_between(x, entropy, loss, color=ORANGE, alpha=0.45, lw=0, label="KL")
        axes.plot(x, loss, color=INK, lw=1.4, label="loss")
        axes.axhline(ceiling, color=GREY, lw=1, ls=(0, (4, 3)))
        axes.annotate(
            f"ln K = {ceiling:.2f}: uniform",
            (1, ceiling),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            color=GREY,
            fontsize=8.5,
        )
        highest = np.nanmax(loss) if np.isfinite(loss).any() else 0.0
        axes.set_ylim(0, 1.12 * max(ceiling, float(highest)))
        _mark(axes, marks)
        axes.legend(loc="lower left", ncols=3, handlelength=1.6)
        return _svg(figure)


def matrix(title: str, values: Values, names: Sequence[str]) -> bytes:
    """A square matrix [n, n] as colours with a scale, as SVG; names where they can be read.

    Args:
        title: with the unit.
        names: of rows and columns.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(6.2, 5.2), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title)
        shown = axes.imshow(values, cmap="inferno", vmin=0, interpolation="nearest")
        figure.colorbar(shown, ax=axes, shrink=0.8)
        if len(names) <= _NAMES:
            axes.set_xticks(range(len(names)), names, rotation=90)
            axes.set_yticks(range(len(names)), names)
        else:
            axes.set_xticks([])
            axes.set_yticks([])
        return _svg(figure)


def _axes(title: str, wide: bool) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.2, 2.9) if wide else (3.1, 2.1), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=None if wide else 9)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.margins(x=0.01)
    axes.yaxis.set_major_formatter(_plain)
    axes.xaxis.set_major_locator(MaxNLocator(6 if wide else 4, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if wide:
        axes.set_xlabel("step", loc="right", labelpad=1)
    return figure, axes


def _plain(value: float, _: object) -> str:
    return f"{value:g}"


def _draw(axes: Axes, line: Line) -> None:
    x, mean, (low, high) = _buckets(line.x, line.y)
    axes.fill_between(x, low, high, color=line.color, alpha=0.18, lw=0)
    axes.plot(
        x,
        mean,
        color=line.color,
        lw=1.5,
        ls=(0, (4, 2)) if line.dashed else "-",
        marker="o" if line.points or len(x) == 1 else None,
        ms=3.5,
        label=line.label or None,
    )


def _buckets(x: Values, y: Values) -> tuple[Values, Values, tuple[Values, Values]]:
    """Neighbouring rows together, where there are many: their means, least and greatest values."""
    parts = min(len(x), _BUCKETS)
    which = np.arange(len(x)) * parts // max(len(x), 1)
    finite = np.isfinite(y)
    count = np.bincount(which[finite], minlength=parts).astype(np.float64)
    count[count == 0] = np.nan
    mean = np.bincount(which[finite], weights=y[finite], minlength=parts) / count
    low, high = np.full(parts, np.inf), np.full(parts, -np.inf)
    np.minimum.at(low, which[finite], y[finite])
    np.maximum.at(high, which[finite], y[finite])
    empty = np.isnan(count)
    low[empty] = high[empty] = np.nan
    last = np.searchsorted(which, np.arange(parts), side="right") - 1
    return x[last], mean, (low, high)


def _mark(axes: Axes, marks: Sequence[int]) -> None:
    for step in marks:
        axes.axvline(step, color=RED, lw=1.2, alpha=0.7)


def _svg(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    return buffer.getvalue()
