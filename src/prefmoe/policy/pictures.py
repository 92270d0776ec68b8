"""Pictures of a policy: where its routers put their weight, and what steering does."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from prefmoe.data.write import writing
from prefmoe.policy.config import EMPTY
from prefmoe.policy.inspect import RoutingTable

if TYPE_CHECKING:
    from prefmoe.policy.evaluate import SteeringPoint

_COLORS = ("#3b6fb6", "#c8553d", "#4f8a5b", "#8a5aa8", "#c49a2c", "#4aa3a2")
_GRAY = "#8a8a8a"


def draw_routing(table: RoutingTable, file: Path) -> None:
    """The paper's figure 5: mean weight of every group by layer, a panel for the texts of each preference."""
    names = list(table.weights)
    figure = Figure(figsize=(4.6 * len(names), 3.6), layout="constrained")
    for place, name in enumerate(names):
        axes = figure.add_subplot(1, len(names), place + 1)
        for index, group in enumerate(table.groups):
            values = [row[index] for row in table.weights[name]]
            color = _GRAY if group == EMPTY else _COLORS[index % len(_COLORS)]
            axes.plot(
                range(len(values)),
                values,
                color=color,
                linestyle="--" if group == EMPTY else "-",
                label=group,
            )
        axes.set_title(f"{name} texts: own group first in {table.own_group_first[name]:.0%}", fontsize=10)
        axes.set_xlabel("router, from bottom to top")
        axes.set_ylabel("mean weight")
        axes.set_ylim(0, 1)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[-1].legend(frameon=False, fontsize=9)
    with writing(file):
        figure.savefig(file, dpi=130, metadata={"Software": None})


def draw_steering(curves: Mapping[str, Sequence["SteeringPoint"]], file: Path) -> None:
    """Mean margin of every preference's pairs while one group is turned, a panel a group."""
    figure = Figure(figsize=(4.6 * len(curves), 3.6), layout="constrained")
    for place, (group, points) in enumerate(curves.items()):
        axes = figure.add_subplot(1, len(curves), place + 1)
        for index, name in enumerate(points[0].margin):
            values = [point.margin[name] for point in points]
            axes.plot(
                [p.weight for p in points], values, "o-", color=_COLORS[index % len(_COLORS)], label=name
            )
        axes.set_xscale("log", base=2)
        axes.set_title(f"turning {group!r}", fontsize=10)
        axes.set_xlabel(f"weight of {group!r}")
        axes.set_ylabel("mean margin on its test pairs")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[-1].legend(frameon=False, fontsize=9)
    with writing(file):
        figure.savefig(file, dpi=130, metadata={"Software": None})
