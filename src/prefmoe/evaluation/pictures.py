"""The pictures of the report: numbers in, PNG with a text that says the same out. No files, no state."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from io import BytesIO
from typing import NamedTuple

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prefmoe.evaluation.best_of_n import BestOfNCurve, kl_best_of_n
from prefmoe.evaluation.metrics import Metrics
from prefmoe.evaluation.run_folder import ExpertCorrelation, RouterConfusion
from prefmoe.evaluation.training_log import Series, TrainingSeries
from prefmoe.evaluation.wording import method_name


class Picture(NamedTuple):
    """A PNG, the width in CSS pixels it is meant for, and the text for people who cannot see it."""

    png: bytes
    width: int
    alt: str


class _Look(NamedTuple):
    color: str
    marker: str
    hatch: str


# Okabe and Ito's colours, told apart by people with any colour vision; markers and hatches for print.
_LOOKS = [
    _Look("#0072B2", "o", ""),
    _Look("#E69F00", "s", "///"),
    _Look("#009E73", "^", "..."),
    _Look("#CC79A7", "D", "\\\\\\"),
    _Look("#56B4E9", "v", "xxx"),
    _Look("#D55E00", "P", "++"),
]
_FIXED = {"dmoerm": 0, "single": 1, "per_task": 2, "single_wide": 3}
_INK, _GRID = "#222222", "#dddddd"
_STYLE = {
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": "#888888",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "text.parse_math": False,  # a task may be called "cost in $"
}
_DPI, _CSS_DPI = 168, 96  # sharp on fine screens, and letters of one size in all pictures
_MAX_TICKS = 12
_MAX_WRITTEN_CELLS = 144


def accuracy_bars(metrics: Metrics) -> Picture:
    """Bars of test accuracy, one group a task, one bar a method, with 95 % intervals."""
    tasks = list(dict.fromkeys(task for method in metrics.methods.values() for task in method.tasks))
    width = min(20.0, max(7.0, 1.2 + 0.36 * len(tasks) * (len(metrics.methods) + 0.7)))
    parts = [
        f"{method_name(name)}: "
        + ", ".join(f"{task} {cell.accuracy:.2f}" for task, cell in method.tasks.items())
        for name, method in metrics.methods.items()
    ]
    draw = partial(_draw_bars, metrics=metrics, tasks=tasks)
    return _picture((width, 3.9), draw, f"Accuracy on each task. {'; '.join(parts)}.")


def training_curve(name: str, series: TrainingSeries) -> Picture:
    """Losses, and accuracy where it was logged, over the steps of one phase."""
    named = {f"{kind} loss": values for kind, values in series.losses.items()}
    if series.mean:
        named["mean validation accuracy"] = series.mean
    ends = "; ".join(f"{kind} {_from_to(values)}" for kind, values in named.items())
    num_panels = bool(series.losses) + bool(series.mean)
    draw = partial(_draw_curves, series=series)
    return _picture((4.8, 0.6 + 2.2 * num_panels), draw, f"{name}: {ends}.")


def router_confusion(confusion: RouterConfusion) -> Picture:
    """Heat map of the share of each task's prompts (row) that was sent to each task (column)."""
    counts = np.array(confusion.counts, dtype=np.float64)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    right = np.diag(shares)
    texts = [
        [f"{shares[i, j]:.2f}\n({count})" for j, count in enumerate(row)]
        for i, row in enumerate(confusion.counts)
    ]
    alt = ", ".join(f"{task} {share:.2f}" for task, share in zip(confusion.tasks, right, strict=True))
    draw = partial(
        _draw_heat_map,
        values=shares,
        texts=texts,
        names=confusion.tasks,
        labels=("sent to", "true task"),
        colors=("Blues", 0.0, 1.0),
    )
    size = _heat_map_size(confusion.tasks, 0.85)
    return _picture(size, draw, f"Share of prompts sent to the right task: {alt}.")


def expert_correlation(task: str, correlation: ExpertCorrelation) -> Picture:
    """Heat map of the correlation between the experts of one task."""
    matrix = np.array(correlation.matrix, dtype=np.float64)
    texts = [["–" if math.isnan(v) else f"{v:.2f}".replace("-", "−") for v in row] for row in matrix]
    pairs = [
        f"{correlation.experts[i]} and {correlation.experts[j]} {texts[i][j]}"
        for i in range(len(matrix))
        for j in range(i)
    ]
    draw = partial(
        _draw_heat_map,
        values=matrix,
        texts=texts,
        names=correlation.experts,
        labels=("", ""),
        colors=("PuOr_r", -1.0, 1.0),
    )
    size = _heat_map_size(correlation.experts, 0.6)
    return _picture(size, draw, f"Correlation of the experts of {task}: {', '.join(pairs)}.")


def best_of_n_curves(curves: Mapping[str, BestOfNCurve]) -> Picture:
    """Gold reward over n, with the distance from plain sampling on a second axis."""
    ends = [
        f"{method_name(name)} from {c.gold[0]:.2f} at n={c.n[0]} to {c.gold[-1]:.2f} at n={c.n[-1]}"
        for name, c in curves.items()
    ]
    draw = partial(_draw_best_of_n, curves=curves)
    return _picture((7.0, 4.3), draw, f"Gold reward: {'; '.join(ends)}.")


def _picture(size: tuple[float, float], draw: Callable[[Figure], None], alt: str) -> Picture:
    """What `draw` puts on a figure of that width and height in inches."""
    buffer = BytesIO()
    with style.context(["default", _STYLE]), warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes; the alt text and the tables spell it.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        warnings.filterwarnings("ignore", message="Matplotlib currently does not support")
        figure = Figure(figsize=size, dpi=_DPI, layout="constrained", facecolor="white")
        draw(figure)
        figure.savefig(buffer, format="png")
    return Picture(buffer.getvalue(), round(size[0] * _CSS_DPI), alt)


def _heat_map_size(names: Sequence[str], cell: float) -> tuple[float, float]:
    side = min(10.0, cell * len(names))
    letters = min(30, max(len(name) for name in names))
    return side + 0.6 + 0.08 * letters, side + 0.6 + 0.05 * letters  # room for the names, which lean below


def _looks(methods: Sequence[str]) -> dict[str, _Look]:
    """A look a method: the same in every picture for methods we know, what is left for the others."""
    free = [look for i, look in enumerate(_LOOKS) if i not in {_FIXED[m] for m in methods if m in _FIXED}]
    unknown = [method for method in methods if method not in _FIXED]
    spare = {method: (free or _LOOKS)[i % len(free or _LOOKS)] for i, method in enumerate(unknown)}
    return {method: spare.get(method) or _LOOKS[_FIXED[method]] for method in methods}


def _draw_bars(figure: Figure, *, metrics: Metrics, tasks: Sequence[str]) -> None:
    axes = figure.subplots()
    looks = _looks(list(metrics.methods))
    width = 0.8 / len(looks)
    for i, (name, method) in enumerate(metrics.methods.items()):
        places = [
            t + (i - (len(looks) - 1) / 2) * width for t, task in enumerate(tasks) if task in method.tasks
        ]
        cells = [method.tasks[task] for task in tasks if task in method.tasks]
        values = np.array([cell.accuracy for cell in cells])
        # A percentile interval can leave its estimate outside; an error bar cannot.
        ends = np.maximum([values - [cell.low for cell in cells], [cell.high for cell in cells] - values], 0)
        axes.bar(
            places,
            values - 0.5,
            width=0.92 * width,
            bottom=0.5,
            label=method_name(name),
            color=looks[name].color,
            hatch=looks[name].hatch,
            edgecolor="white",
        )
        axes.errorbar(places, values, yerr=ends, fmt="none", ecolor=_INK, capsize=3, elinewidth=1.1)
        for place, value, end in zip(places, values, ends[1], strict=True):
            axes.annotate(
                f"{value:.2f}",
                (place, max(value + end, 0.5)),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
    lowest = min(cell.low for method in metrics.methods.values() for cell in method.tasks.values())
    axes.set_ylim(min(0.4, math.floor(lowest * 10) / 10), 1.03)
    axes.axhline(0.5, color=_INK, linewidth=1)
    axes.grid(axis="y", color=_GRID)
    axes.set_ylabel("accuracy (0.5 = guessing)")
    long = len(tasks) > 6
    axes.set_xticks(range(len(tasks)), tasks, rotation=40 if long else 0, ha="right" if long else "center")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=4)


def _from_to(values: Sequence[tuple[int, float]]) -> str:
    (start, first), (end, last) = values[0], values[-1]
    return f"from {first:.3f} at step {start} to {last:.3f} at step {end}"


def _draw_curves(figure: Figure, *, series: TrainingSeries) -> None:
    panels = [*(["loss"] if series.losses else []), *(["accuracy"] if series.mean else [])]
    columns = dict(zip(panels, figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0], strict=True))
    if series.losses:
        axes = columns["loss"]
        for look, (name, values) in zip(_LOOKS, series.losses.items(), strict=False):
            _draw_line(axes, values, look, name)
        axes.axhline(math.log(2), color="#666666", linewidth=1, linestyle="--", label="guessing (ln 2)")
        axes.set_ylabel("loss (nats)")
    if series.mean:
        axes = columns["accuracy"]
        for i, values in enumerate(series.experts.values()):
            label = f"each of {len(series.experts)} experts" if i == 0 else None
            axes.plot(*zip(*values, strict=True), color="#bbbbbb", linewidth=0.8, label=label)
        _draw_line(axes, series.mean, _LOOKS[1], "mean")
        axes.set_ylabel("validation accuracy")
    for axes in columns.values():
        axes.grid(color=_GRID)
        axes.legend(fontsize=8, ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    columns[panels[-1]].set_xlabel("step")


def _draw_line(axes: Axes, values: Series, look: _Look, label: str) -> None:
    marker = look.marker if len(values) <= 20 else ""
    axes.plot(
        *zip(*values, strict=True), color=look.color, marker=marker, markersize=4, linewidth=1.4, label=label
    )


def _draw_heat_map(
    figure: Figure,
    *,
    values: np.ndarray,
    texts: Sequence[Sequence[str]],
    names: Sequence[str],
    labels: tuple[str, str],
    colors: tuple[str, float, float],
) -> None:
    axes = figure.subplots()
    color_map, low, high = colors
    image = axes.imshow(values, cmap=color_map, vmin=low, vmax=high)
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.spines[:].set_visible(False)
    if values.size <= _MAX_WRITTEN_CELLS:
        for (row, column), value in np.ndenumerate(values):
            dark = abs(value) > 0.6 * high
            axes.text(
                column, row, texts[row][column], ha="center", va="center", color="white" if dark else _INK
            )
    else:
        figure.colorbar(image, ax=axes, shrink=0.8)


def _draw_best_of_n(figure: Figure, *, curves: Mapping[str, BestOfNCurve]) -> None:
    axes = figure.subplots()
    for name, look in _looks(list(curves)).items():
        curve = curves[name]
        places = np.log2(curve.n)
        axes.plot(
            places, curve.gold, color=look.color, marker=look.marker, markersize=5, label=method_name(name)
        )
        axes.fill_between(places, curve.low, curve.high, color=look.color, alpha=0.15, linewidth=0)
    _label_n_and_kl(axes, sorted({n for curve in curves.values() for n in curve.n}))
    axes.grid(color=_GRID)
    axes.set_ylabel("gold reward of the chosen completion")
    axes.legend()


def _label_n_and_kl(axes: Axes, ns: Sequence[int]) -> None:
    shown = ns[:: math.ceil(len(ns) / _MAX_TICKS)]
    places = [math.log2(n) for n in shown]
    axes.set_xticks(places, [str(n) for n in shown])
    axes.set_xlabel("n: completions the reward model chooses from")
    top = axes.secondary_xaxis("top")
    top.set_xticks(places, [f"{kl_best_of_n(n):.2f}" for n in shown])
    top.set_xlabel("distance from plain sampling: KL (nats)")
