"""`metrics.json` has the promised shape, survives a full disk, and damaged files are named."""

import errno
import json
import os

import pytest

from prefmoe.errors import ConfigError, DataError, OutputError, ShapeError
from prefmoe.evaluation.metrics import build_metrics, read_metrics, write_metrics

MARGINS = {
    "single": {"advice": [1.0, -1.0, 0.0, 2.0], "facts": [-1.0, -2.0]},
    "dmoerm": {"advice": [1.0, 1.0, 1.0, 2.0], "facts": [1.0, -2.0]},
}


def test_the_file_has_the_promised_shape(tmp_path):
    path = tmp_path / "metrics.json"
    write_metrics(build_metrics(MARGINS, router_accuracy=0.5, seconds={"router": 1.5}), path)
    content = json.loads(path.read_text())
    assert content.keys() == {"router", "methods", "paired", "seconds"}
    assert content["router"] == {"accuracy": 0.5}
    assert content["seconds"] == {"router": 1.5}
    assert content["methods"]["single"]["macro"] == pytest.approx((0.625 + 0.0) / 2)
    advice = content["methods"]["single"]["tasks"]["advice"]
    assert advice.keys() == {"accuracy", "low", "high", "pairs"}
    assert (advice["accuracy"], advice["pairs"]) == (0.625, 4)
    assert content["paired"].keys() == {"dmoerm-single"}
    assert content["paired"]["dmoerm-single"].keys() == {"macro", "low", "high"}
    assert content["paired"]["dmoerm-single"]["macro"] == pytest.approx(0.75 - 0.3125)


def test_reading_gives_back_what_was_written(tmp_path):
    metrics = build_metrics(MARGINS)
    write_metrics(metrics, tmp_path / "m.json")
    assert read_metrics(tmp_path / "m.json") == metrics
    assert metrics.router is None


def test_the_subject_is_compared_with_every_other_method():
    margins = MARGINS | {"per_task": MARGINS["single"]}
    assert list(build_metrics(margins).paired) == ["dmoerm-single", "dmoerm-per_task"]
    assert list(build_metrics(margins, subject="single").paired) == ["single-dmoerm", "single-per_task"]
    assert build_metrics({"single": MARGINS["single"]}).paired == {}


def test_pairs_of_one_prompt_are_resampled_together():
    ids = {"advice": ["p", "p", "p", "p"], "facts": ["q", "r"]}
    advice = build_metrics(MARGINS, prompt_ids=ids).methods["single"].tasks["advice"]
    assert advice.low == advice.high == 0.625
    with pytest.raises(ShapeError, match="prompt_ids: got 0 rows; expected 2"):
        build_metrics({"single": MARGINS["single"]}, prompt_ids={"advice": ids["advice"]})


def test_methods_that_cannot_be_reported():
    with pytest.raises(
        ConfigError, match=r"\['a-b'\] cannot be reported; give one or more names without '-'"
    ):
        build_metrics({"a-b": {"t": [1.0]}})
    with pytest.raises(ConfigError, match="give one or more names"):
        build_metrics({})
    with pytest.raises(DataError, match="measure both on the same pairs"):
        build_metrics({"dmoerm": {"t": [1.0]}, "single": {"u": [1.0]}})


def test_a_full_disk_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    write_metrics(build_metrics(MARGINS), path)
    before = path.read_bytes()

    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OutputError, match=r"metrics\.json: could not be written; No space left on device; free"
    ):
        write_metrics(build_metrics(MARGINS, router_accuracy=1.0), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(OutputError, match=r"nowhere/m\.json: could not be written; No such file"):
        write_metrics(build_metrics(MARGINS), tmp_path / "nowhere" / "m.json")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "m.json: Invalid JSON"),
        ("{}", "m.json: methods: Field required"),
        (
            '{"methods": {"a": {"macro": "x", "tasks": {}}}}',
            "methods.a.macro: Input should be a valid number.*; got 'x'",
        ),
        (
            '{"methods": {"a": {"macro": NaN, "tasks": {}}}}',
            "methods.a.macro: Input should be a finite number",
        ),
        ('{"methods": {}, "extra": 1}', "extra: Extra inputs are not permitted"),
    ],
)
def test_a_damaged_file_is_named_with_the_place(tmp_path, text, sentence):
    path = tmp_path / "m.json"
    path.write_text(text)
    with pytest.raises(DataError, match=sentence):
        read_metrics(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.json: cannot be read; No such file or directory"):
        read_metrics(tmp_path / "none.json")
