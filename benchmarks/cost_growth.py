"""How the time of scoring grows with experts, completions, prompt length and the split, beside the floor.

    python benchmarks/cost_growth.py --out benchmarks/results/cost_growth.json --picture docs/pictures/cost_growth.png

One quantity grows at a time, the others stay as the options say. The floor is DESIGN's formula in layer-tokens, divided
by the layer-tokens a second of the bare backbone on dense full batches, measured in the same repeats. Medians.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from harness.loads import floor_layer_tokens, made_up_texts
from harness.models import add_model_options, backbone_of, bare_pass, expert_rewards, random_reward_model
from harness.timing import alternating, device_at_hand, machine, write_result
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

GROWING = {
    "experts": (1, 2, 4, 8, 16, 32),
    "completions": (1, 2, 4, 8, 16, 32, 64),
    "prompt_tokens": (64, 128, 256, 512, 1024, 2048),
    "split": (0.0, 0.25, 0.5, 0.75),
}
AXES = {
    "experts": "experts K",
    "completions": "completions N of one prompt",
    "prompt_tokens": "tokens of the prompt",
    "split": "share of the layers below the experts",
}
MOST_IN_SMOKE = 4  # points of a curve
Point = dict[str, float]


def main(argv: Sequence[str] | None = None) -> dict[str, object]:
    arguments = parse(argv)
    backbone = backbone_of(arguments, device_at_hand())
    base: Point = {
        "experts": arguments.experts,
        "completions": arguments.completions,
        "prompt_tokens": arguments.prompt_tokens,
        "split": arguments.split_layer / len(backbone.layers),
    }
    bare, bare_layer_tokens = bare_pass(backbone, arguments.prompt_tokens, arguments.batch_tokens)
    bare()  # warm-up
    curves = {}
    for name, values in GROWING.items():
        values = values[:MOST_IN_SMOKE] if arguments.smoke else values
        points = {value: base | {name: value} for value in values}
        curves[name] = measure(arguments, backbone, points, (bare, bare_layer_tokens))
    result: dict[str, object] = {
        "what": "seconds of scoring all completions of one prompt, and of the floor; medians",
        "machine": machine(),
        "dtype": str(backbone.dtype),
        "layers": len(backbone.layers),
        "settings": {name: str(value) for name, value in vars(arguments).items()},
        "curves": curves,
    }
    show(curves)
    write_result(result, arguments.out)
    if arguments.picture:
        arguments.picture.parent.mkdir(parents=True, exist_ok=True)
        draw(curves).savefig(arguments.picture)
    return result


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_options(parser, num_layers=4, split_layer=2)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--completions", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--completion-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--picture", type=Path)
    return parser.parse_args(argv)


def measure(
    arguments, backbone, points: dict[float, Point], bare: tuple[Callable[[], object], int]
) -> list[dict[str, float]]:
    """One curve."""
    works, floors = {}, {}
    for value, point in points.items():
        works[str(value)], floors[str(value)] = scoring(arguments, backbone, point)
        works[str(value)]()  # warm-up
    bare_pass, bare_layer_tokens = bare
    times = alternating({**works, "bare": bare_pass}, arguments.repeats)
    speed = bare_layer_tokens / statistics.median(times.pop("bare"))
    return [
        {
            "value": value,
            "seconds": round(statistics.median(times[str(value)]), 4),
            "floor_seconds": round(floors[str(value)] / speed, 4),
            "floor_layer_tokens": floors[str(value)],
        }
        for value in points
    ]


def scoring(arguments, backbone, point: Point) -> tuple[Callable[[], object], int]:
    """What scores the texts of a point, and their floor."""
    layers, experts = len(backbone.layers), int(point["experts"])
    split_layer = round(point["split"] * layers)
    model = random_reward_model(backbone, experts=experts, split_layer=split_layer)
    texts = made_up_texts(
        1,
        int(point["completions"]),
        prompt_tokens=int(point["prompt_tokens"]),
        completion_tokens=arguments.completion_tokens,
        vocabulary=backbone.config.vocab_size,
    )
    floor = floor_layer_tokens(texts, layers=layers, split_layer=split_layer, experts=experts)
    return partial(expert_rewards, model, texts, arguments.batch_tokens), floor


def show(curves: dict[str, list[dict[str, float]]]) -> None:
    table = Table("what grows", "value", "seconds", "floor", "share of floor")
    for name, points in curves.items():
        for point in points:
            share = point["floor_seconds"] / point["seconds"]
            seconds = (f"{point[key]:.3f}" for key in ("seconds", "floor_seconds"))
            table.add_row(name, str(point["value"]), *seconds, f"{share:.2f}")
    Console().print(table)


def draw(curves: dict[str, list[dict[str, float]]]) -> Figure:
    figure = Figure(figsize=(9, 6.5), dpi=120, layout="constrained", facecolor="white")
    panels = figure.subplots(2, 2).flat
    for axes, (name, points) in zip(panels, curves.items(), strict=True):
        values = [point["value"] for point in points]
        axes.plot(values, [p["seconds"] for p in points], "o-", color="#0072B2", label="measured")
        axes.plot(values, [p["floor_seconds"] for p in points], "s--", color="#E69F00", label="floor")
        if name != "split":
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(values, [str(value) for value in values])
        else:
            axes.set_xticks(values)
            axes.set_ylim(bottom=0)
        axes.set_xlabel(AXES[name])
        axes.set_ylabel("seconds")
        axes.grid(color="#dddddd")
        axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    main()
