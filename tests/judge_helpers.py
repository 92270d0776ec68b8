"""Pairs, a tasks file and settings for the tests of the judge."""

from pathlib import Path

from data_helpers import assistant, user, write_rows
from judge_server import by_hash, texts_of
from prefmoe.labeling import TaskFile
from prefmoe.labeling.judge.questions import Interview, Question, choose_points
from prefmoe.labeling.judge.settings import JudgeSettings
from prefmoe.records import PreferencePair

TASKS = {
    "tasks": {
        "chat": {
            "description": "Talk.",
            "capabilities": {
                "wit": {"sentence": "It is funny.", "sentence_zh": "它很有趣。"},
                "brevity": {"sentence": "It is short.", "rule": "concise"},
            },
        },
        "facts": {"description": "Facts.", "capabilities": {"truth": "It is right."}},
    }
}
TASKS_YAML = """
tasks:
  chat:
    description: Talk.
    capabilities:
      wit: It is funny.
      brevity: {sentence: It is short., rule: concise}
  facts:
    description: Facts.
    capabilities:
      truth: It is right.
"""


def task_file() -> TaskFile:
    return TaskFile.model_validate(TASKS)


def pair(
    name: str = "p0", *, task: str | None = "chat", chosen: str = "", rejected: str = "", **changes: object
) -> PreferencePair:
    texts = {
        "chosen": assistant(chosen or f"chosen {name}"),
        "rejected": assistant(rejected or f"rejected {name}"),
    }
    return PreferencePair(name, user(f"question {name}?"), **texts, task=task, **changes)


def pairs(num: int, task: str = "chat") -> list[PreferencePair]:
    return [pair(f"p{i}", task=task) for i in range(num)]


def settings(**changes: object) -> JudgeSettings:
    return JudgeSettings(**{"judge": "m", "attempts": 4, **changes})


def interview(**changes: object) -> Interview:
    tasks = task_file()
    values = {"judge": "m", "tasks": tasks.tasks, "points": choose_points(tasks), **changes}
    return Interview(**values)


def question(name: str = "p0", **changes: object) -> Question:
    """The first question on a pair: about wit, chosen first."""
    return next(iter(interview(**changes).questions(pair(name))))


def side_by_hash(one: PreferencePair) -> int:
    """The label that the server's opinion `by_hash` gives."""
    first, second = one.chosen[0].content, one.rejected[0].content
    shown = f"[Answer 1]\n{first}\n[End of answer 1]\n\n[Answer 2]\n{second}\n[End of answer 2]"
    assert texts_of(shown) == (first, second)
    return {"1": 1, "2": -1, "0": 0}[by_hash(shown)]


def write_input(folder: Path, num: int, *, task: str = "chat") -> tuple[Path, Path]:
    """A file of pairs and the tasks file."""
    rows = [
        {
            "id": f"p{i}",
            "task": task,
            "prompt": f"question p{i}?",
            "chosen": f"chosen p{i}",
            "rejected": f"rejected p{i}",
            "note": i,
        }
        for i in range(num)
    ]
    (folder / "tasks.yaml").write_text(TASKS_YAML, encoding="utf-8")
    return write_rows(folder / "pairs.jsonl", rows), folder / "tasks.yaml"
