"""From pairs to capability experts: `reward train` on the very file that `prefmoe label` wrote."""

import json
import re

import pytest
import yaml

from cli_helpers import pair_rows, run_cli, write_config
from data_helpers import write_rows
from judge_server import FIRST, SECOND, JudgeServer, completion, texts_of
from prefmoe.reward import phases

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])

TASKS = {
    "tasks": {
        task: {
            "description": f"They want {task}.",
            "capabilities": {"warmth": "It is warm.", "clarity": "It is clear."},
        }
        for task in ("advice", "facts")
    }
}


def opinion(user):
    """Says "1" whatever stands there, but to the warmth of most advice: there odd numbers have a warmer "Yes"."""
    first, _ = texts_of(user)
    number = int(re.search(r"\d+", first)[0])
    if "They want advice." not in user or "It is warm." not in user or number % 4 == 3:
        return FIRST
    return FIRST if first.startswith("Yes") == bool(number % 2) else SECOND


def test_experts_learn_from_the_labels_that_were_kept(backbone_folder, tmp_path, monkeypatch):
    rows = [{k: v for k, v in row.items() if k != "capabilities"} for row in pair_rows("train", num=8)]
    pairs = write_rows(tmp_path / "pairs.jsonl", rows)
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(TASKS), encoding="utf-8")
    labelled = tmp_path / "labelled.jsonl"
    with JudgeServer(lambda request: completion(opinion(request["messages"][-1]["content"]))) as server:
        options = ("--tasks", tmp_path / "tasks.yaml", "--judge", "m", "--base-url", server.url)
        done = run_cli("label", pairs, "-o", labelled, *options)
    assert done.exit_code == 0, done.output
    kept = [json.loads(line)["capabilities"] for line in labelled.read_text(encoding="utf-8").splitlines()]
    expected = [{"warmth": 1 if i % 2 else -1} if i % 4 < 3 else {} for i in range(8)] + [{}] * 8
    assert kept == expected

    learned = {}

    def spy(*arguments, **options):
        learned.update({job.name: [row.label for row in job.train] for job in arguments[3]})
        return train_experts(*arguments, **options)

    train_experts = phases.train_experts
    monkeypatch.setattr(phases, "train_experts", spy)
    config = write_config(tmp_path, backbone_folder)
    # Cross-fitting trains one expert on all pairs too.
    changes = (f"data.train={labelled}", "data.labels=columns", "phase3.split=crossfit")
    done = run_cli("reward", "train", config, *(part for change in changes for part in ("--set", change)))
    assert done.exit_code == 0, done.output
    assert learned["advice/warmth"] == [0.0, 1.0, 0.0, 0.0, 1.0, 0.0]
    assert not any("clarity" in name or name.startswith("facts/") for name in learned)
    saved = json.loads((tmp_path / "run" / "dmoerm" / "config.json").read_text(encoding="utf-8"))
    assert saved["tasks"] == {"advice": ["warmth"], "facts": []}
