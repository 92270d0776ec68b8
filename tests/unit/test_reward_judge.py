"""`data.labels: {judge: ...}` in a training config: what is missing is labelled first."""

from contextlib import contextmanager
from dataclasses import replace
from math import log

import pytest
import yaml

from data_helpers import write_rows
from judge_helpers import TASKS_YAML, pairs, side_by_hash
from judge_server import JudgeServer, completion
from prefmoe.errors import ConfigError, DataError, PrefmoeError
from prefmoe.reward.settings import check_settings, load_settings
from prefmoe.reward.splits import find_capabilities, label_splits

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])


def settings(folder, url, **judge):
    (folder / "tasks.yaml").write_text(TASKS_YAML, encoding="utf-8")
    labels = {"judge": "m", "base_url": url, "attempts": 1, **judge}
    data = {"train": "unused", "labels": labels, "tasks_file": str(folder / "tasks.yaml")}
    return check_settings({"data": data, "out": str(folder / "runs" / "a")}, where="config")


def splits():
    rows = pairs(6)
    return {"train": rows[:3], "validation": rows[3:5], "test": rows[5:]}


def test_training_and_validation_pairs_are_labelled_and_test_pairs_are_not(tmp_path):
    with JudgeServer() as server:
        labelled = label_splits(splits(), settings(tmp_path, server.url))
        assert len(server.requests) == 5 * 4
        again = label_splits(splits(), settings(tmp_path, server.url))
        assert len(server.requests) == 5 * 4  # a resumed run finds its answers, a run beside it too
    assert again == labelled
    assert (tmp_path / "runs" / "answers.sqlite").exists()
    for name in ("train", "validation"):
        for before, after in zip(splits()[name], labelled[name], strict=True):
            assert dict(after.capabilities) == dict.fromkeys(["wit", "brevity"], side_by_hash(before))
    assert labelled["test"] == splits()["test"]


def test_further_pairs_for_capabilities_are_labelled_too(tmp_path):
    rows = pairs(6)
    given = {"train": rows[:1], "validation": rows[1:2], "test": rows[2:3], "capability_train": rows[3:]}
    with JudgeServer() as server:
        labelled = label_splits(given, settings(tmp_path, server.url))
        assert len(server.requests) == 5 * 4
    for before, after in zip(rows[3:], labelled["capability_train"], strict=True):
        assert dict(after.capabilities) == dict.fromkeys(["wit", "brevity"], side_by_hash(before))


def test_soft_labels_of_a_judge_and_of_rows_are_kept_where_they_are_asked_for(tmp_path):
    shown = [
        {"token": "1", "top_logprobs": [{"token": t, "logprob": log(p)} for t, p in (("1", 0.8), ("2", 0.2))]}
    ]
    given = splits()
    given["train"][0] = replace(given["train"][0], capability_probabilities={"wit": 0.9})
    with JudgeServer(lambda _: completion("1", logprobs=shown)) as server:
        chosen = settings(tmp_path, server.url, confidence=True)
        hard = label_splits(given, chosen)
        soft = label_splits(given, with_data(chosen, soft_labels=True))
        assert len(server.requests) == 5 * 4
    assert not any(pair.capability_probabilities for pairs in hard.values() for pair in pairs)
    # "1" in both orders: no label, and a probability of one half; that of the row stays.
    assert [pair.capabilities for pair in soft["train"]] == [{}] * 3
    expected = [{"wit": 0.9, "brevity": 0.5}, *[{"wit": 0.5, "brevity": 0.5}] * 2]
    assert [pair.capability_probabilities for pair in soft["train"]] == [
        pytest.approx(one) for one in expected
    ]
    assert find_capabilities(soft["train"], chosen.data) == {"chat": ["brevity", "wit"]}


def test_soft_labels_that_are_nowhere_stop_the_training(tmp_path):
    chosen = settings(tmp_path, "http://127.0.0.1:1")
    columns = with_data(chosen, labels="columns", soft_labels=True)
    with pytest.raises(DataError, match="no training pair has 'capability_probabilities'; label with"):
        label_splits(splits(), columns)


def with_data(chosen, **changes):
    return chosen.model_copy(update={"data": chosen.data.model_copy(update=changes)})


def test_a_budget_that_ends_too_early_stops_the_training(tmp_path):
    with (
        JudgeServer() as server,
        pytest.raises(PrefmoeError, match="raise max_calls or max_usd, the same command"),
    ):
        label_splits(splits(), settings(tmp_path, server.url, max_calls=3))


def test_progress_is_shown(tmp_path):
    seen = []

    @contextmanager
    def watcher(total):
        yield lambda progress: seen.append((progress.calls, total, progress.usd))

    prices = {"input_price": 1, "output_price": 10}
    with JudgeServer() as server:
        label_splits(splits(), settings(tmp_path, server.url, **prices), watcher=watcher)
    assert [(calls, total) for calls, total, _ in seen] == [(n, 20) for n in range(1, 21)]
    assert seen[-1][2] == pytest.approx(20 * (100 * 1 + 1 * 10) / 1e6)  # tokens as the server counts them


def test_a_judge_needs_a_tasks_file(tmp_path):
    chosen = settings(tmp_path, "http://127.0.0.1:1")
    without = chosen.model_copy(update={"data": chosen.data.model_copy(update={"tasks_file": None})})
    with pytest.raises(ConfigError, match="data.labels is a judge, but data.tasks_file is not given"):
        label_splits(splits(), without)


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        ({"judge": "m", "basurl": "x"}, r"data.labels.basurl: unknown key; did you mean 'base_url'\?"),
        ({"judge": "m", "max_calls": 0}, "data.labels.max_calls: Input should be greater than 0; got 0"),
        ({"judge": "m", "max_usd": 1}, "data.labels: max_usd needs input_price and output_price"),
        ({}, "data.labels.judge: missing; add it"),
        ("rule", "data.labels: Input should be 'columns' or 'rules'; got 'rule'"),
    ],
)
def test_mistakes_in_a_config_are_named(labels, sentence):
    with pytest.raises(ConfigError, match=sentence):
        check_settings({"data": {"train": "x", "labels": labels}}, where="config")


def test_soft_labels_need_probabilities():
    data = {"train": "x", "soft_labels": True, "labels": {"judge": "m"}}
    with pytest.raises(ConfigError, match="soft_labels needs probabilities; add confidence: true to labels"):
        check_settings({"data": data}, where="config")
    for labels in ("columns", {"judge": "m", "confidence": True}, {"judge": "local:m"}):
        assert check_settings({"data": data | {"labels": labels}}, where="config").data.soft_labels


def test_a_config_with_a_judge_is_read_back_as_it_was_written(tmp_path):
    chosen = settings(tmp_path, "http://127.0.0.1:1")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(chosen.model_dump()), encoding="utf-8")
    assert load_settings(path) == chosen
    assert write_rows(tmp_path / "x.jsonl", [])
