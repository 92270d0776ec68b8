from pathlib import Path

import pytest

from prefmoe.errors import ConfigError
from prefmoe.labeling import RuleLabeler, load_tasks

CONFIGS = Path(__file__).parents[2] / "configs"

GOOD = """
tasks:
  chat:
    description: Talk.
    capabilities:
      brevity: {sentence: It is short., rule: concise}
      wit: It is funny.
"""


def written(folder, text):
    path = folder / "tasks.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_capability_is_a_sentence_with_or_without_a_rule(tmp_path):
    tasks = load_tasks(written(tmp_path, GOOD))
    points = tasks.tasks["chat"].capabilities
    assert [point.sentence for point in points.values()] == ["It is short.", "It is funny."]
    assert tasks.rules() == {"chat": {"brevity": "concise"}}


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("tasks:", "task:", "tasks.yaml: task: unknown key; did you mean 'tasks'?"),
        ("description", "descripton", "tasks.chat.descripton: unknown key; did you mean 'description'?"),
        ("rule:", "rules:", "tasks.chat.capabilities.brevity.rules: unknown key; did you mean 'rule'?"),
        (
            "rule:",
            "zzz:",
            "tasks.chat.capabilities.brevity.zzz: unknown key; expected 'sentence' or 'sentence_zh' or 'rule'",
        ),
        ("sentence: It is short., ", "", "tasks.chat.capabilities.brevity.sentence: missing; add it"),
        ("Talk.", "''", "tasks.chat.description: empty; fill it in"),
        ("Talk.", "[1]", "tasks.chat.description: got [1]; input should be a valid string"),
        ("It is funny.", "", "tasks.chat.capabilities.wit: got None; expected 'name: value' lines below it"),
        ("wit", "7", "tasks.chat.capabilities.7: got 7; input should be a valid string"),
        ("wit", "brevity", "tasks.yaml:7: 'brevity' is given twice; keep one"),
        ("Talk.", "a: b: c", "tasks.yaml:4: mapping values are not allowed here"),
        ("Talk.", "!!python/name:os.system", "tasks.yaml:4: could not determine a constructor"),
        (GOOD, "tasks: {}", "tasks.yaml: tasks: empty; fill it in"),
        (GOOD, "", "tasks.yaml: top level: got None; expected 'name: value' lines below it"),
        (GOOD, "a: \0", "tasks.yaml: not YAML: unacceptable character #x0000"),
    ],
)
def test_a_mistake_is_named_with_its_place_and_remedy(tmp_path, old, new, sentence):
    assert old in GOOD
    with pytest.raises(ConfigError) as raised:
        load_tasks(written(tmp_path, GOOD.replace(old, new, 1)))
    assert sentence in str(raised.value)


def test_all_mistakes_are_listed_at_once(tmp_path):
    text = GOOD.replace("description", "descripton").replace("rule:", "rules:")
    with pytest.raises(ConfigError) as raised:
        load_tasks(written(tmp_path, text))
    assert str(raised.value).count("unknown key") == 2


def test_a_missing_file_and_other_encodings_are_refused_in_words(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: the tasks file cannot be read: No such file"):
        load_tasks(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="not UTF-8 at byte 3; save the file as UTF-8"):
        load_tasks(written(tmp_path, b"a: \xff"))


def test_the_shipped_real_tasks_have_three_rules_each():
    tasks = load_tasks(CONFIGS / "tasks-real.yaml")
    assert list(tasks.tasks) == ["helpful", "harmless", "paraphrase", "translation", "summarization"]
    assert {len(rules) for rules in tasks.rules().values()} == {3}
    assert RuleLabeler.from_tasks(tasks).capabilities


def test_the_shipped_tasks_of_the_paper_have_its_points():
    tasks = load_tasks(CONFIGS / "tasks-dmoerm.yaml")
    num_points = {name: len(task.capabilities) for name, task in tasks.tasks.items()}
    assert num_points == {"roleplay": 6, "chat": 5, "subj_qa": 5, "obj_qa": 6, "text": 5}  # SPECS.md 2.1
    assert RuleLabeler.from_tasks(tasks).capabilities
