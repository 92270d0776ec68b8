"""Pictures are PNGs that say the same in words, for any names and numbers."""

import struct

from prefmoe.evaluation import pictures
from prefmoe.evaluation.best_of_n import BestOfNCurve
from prefmoe.evaluation.metrics import build_metrics
from prefmoe.evaluation.run_folder import ExpertCorrelation, LogLine, RouterConfusion
from prefmoe.evaluation.training_log import training_series

NAMES = ["advice", "写作", "cost in $ or $$", "a name that is much longer than any name should be \x00"]


def size(picture):
    assert picture.png.startswith(b"\x89PNG\r\n")
    return struct.unpack(">II", picture.png[16:24])


def lines(phase, **numbers):
    length = len(next(iter(numbers.values())))
    steps = range(0, 10 * length, 10)
    columns = [dict(zip(numbers, row, strict=True)) for row in zip(*numbers.values(), strict=True)]
    return [
        LogLine.model_validate({"step": step, "phase": phase, **row})
        for step, row in zip(steps, columns, strict=True)
    ]


def test_bars_for_odd_names_and_many_methods():
    methods = ["dmoerm", "single", *NAMES, "x", "y"]
    metrics = build_metrics({method: {name: [1.0, -1.0, 1.0] for name in NAMES} for method in methods})
    picture = pictures.accuracy_bars(metrics)
    width, height = size(picture)
    assert width > height
    assert "DMoERM: advice 0.67, 写作 0.67" in picture.alt
    assert "Single reward model: " in picture.alt


def test_bars_where_a_method_lacks_a_task():
    metrics = build_metrics({"a": {"t": [1.0], "u": [-1.0]}, "b": {"t": [1.0]}})
    assert pictures.accuracy_bars(metrics).alt == "Accuracy on each task. a: t 1.00, u 0.00; b: t 1.00."


def test_every_method_has_its_own_look():
    looks = pictures._looks(["other", "dmoerm", "single", "per_task", "single_wide"])
    assert len(set(looks.values())) == len(looks)
    assert looks["dmoerm"] == pictures._looks(["dmoerm"])["dmoerm"]


def test_a_training_curve_tells_its_ends():
    log = lines("p", loss=[1.5, 0.25], eval_loss=[1.6, 0.5], eval_accuracy=[0.5, 1.0])
    picture = pictures.training_curve("Phase", training_series(log))
    assert picture.alt == (
        "Phase: training loss from 1.500 at step 0 to 0.250 at step 10; "
        "validation loss from 1.600 at step 0 to 0.500 at step 10; "
        "mean validation accuracy from 0.500 at step 0 to 1.000 at step 10."
    )
    only_loss = pictures.training_curve("Phase", training_series(lines("p", loss=[1.5, 0.25])))
    assert size(picture)[0] == size(only_loss)[0]
    assert size(picture)[1] > size(only_loss)[1]


def test_a_phase_of_many_experts_is_as_large_as_one_of_few():
    sizes = []
    for number in (1, 60):
        each = {f"eval_accuracy/{'a long name of a task' * 3} {i}": [0.5, 0.6] for i in range(number)}
        series = training_series(lines("p", loss=[1.5, 0.25], eval_accuracy=[0.5, 0.6], **each))
        assert len(series.experts) == number
        sizes.append(size(pictures.training_curve("Phase", series)))
    assert sizes[0] == sizes[1]


def test_the_router_picture_tells_the_share_of_each_task():
    picture = pictures.router_confusion(RouterConfusion(tasks=["a", "b"], counts=[[3, 1], [0, 0]]))
    assert picture.alt == "Share of prompts sent to the right task: a 0.75, b 0.00."
    assert size(picture) > (0, 0)


def test_many_tasks_get_a_scale_instead_of_numbers():
    tasks = [f"scenario {i}" for i in range(30)]
    counts = [[10 * (i == j) for j in range(30)] for i in range(30)]
    assert pictures.router_confusion(RouterConfusion(tasks=tasks, counts=counts)).width < 1200


def test_experts_without_a_correlation_are_shown_as_such():
    correlation = ExpertCorrelation(experts=["x", "y"], matrix=[[1.0, None], [float("nan"), 1.0]])
    assert (
        pictures.expert_correlation("facts", correlation).alt
        == "Correlation of the experts of facts: y and x –."
    )


def test_best_of_n_tells_its_ends():
    curve = BestOfNCurve(n=[1, 4], gold=[0.0, 1.0], low=[0.0, 0.5], high=[0.1, 1.5], proxy=[0.0, 2.0])
    picture = pictures.best_of_n_curves({"dmoerm": curve, "写作": curve})
    assert picture.alt.startswith("Gold reward: DMoERM from 0.00 at n=1 to 1.00 at n=4; ")


def test_the_same_numbers_give_the_same_file():
    metrics = build_metrics({"dmoerm": {"t": [1.0, -1.0, 1.0]}})
    assert pictures.accuracy_bars(metrics) == pictures.accuracy_bars(metrics)
