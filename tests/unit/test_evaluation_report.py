"""The report: readable, self-contained, safe with any text, and made from whatever the folder holds."""

import json
import re
from html.parser import HTMLParser

import pytest

from made_up_run import TASKS, made_up_pair, write_made_up_run
from prefmoe.errors import DataError, OutputError
from prefmoe.evaluation.report import build_report
from prefmoe.evaluation.run_folder import FILES, read_run, scored_pair, write_run_file
from prefmoe.records import Message, PreferencePair, RewardReport

VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Elements, ids, links and text of a page; fails on tags that do not close."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.images, self.ids, self.links, self.text, self.open = [], [], [], [], "", []
        self.feed(html)
        assert self.open == []
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append(tag)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found[name] for name in ("href", "src") if name in found]
        self.images += [found] if tag == "img" else []
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += "" if "style" in self.open else data


def page_of(folder):
    return Page(build_report(folder).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    return write_made_up_run(tmp_path_factory.mktemp("runs") / "whole", num_pairs=40)


@pytest.fixture(scope="module")
def whole_page(whole_run):
    return page_of(whole_run)


def test_the_page_loads_nothing(whole_page):
    assert "script" not in whole_page.tags
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in whole_page.links)


def test_every_picture_has_a_text(whole_page):
    assert len(whole_page.images) == 2 + 1 + len(TASKS) + 3  # bars, best of n; router; experts; phases
    assert all(len(image["alt"]) > 20 for image in whole_page.images)


def test_every_link_of_the_contents_leads_somewhere(whole_page):
    inside = [link[1:] for link in whole_page.links if link.startswith("#")]
    assert len(inside) == 8
    assert set(inside) == set(whole_page.ids)


def test_the_numbers_of_the_metrics_are_on_the_page(whole_run, whole_page):
    metrics = json.loads((whole_run / "metrics.json").read_text())
    for method in metrics["methods"].values():
        assert f"{method['macro']:.3f}" in whole_page.text
        for cell in method["tasks"].values():
            assert f"{cell['accuracy']:.3f}" in whole_page.text
            assert f"{cell['low']:.3f} to {cell['high']:.3f}" in whole_page.text
    for difference in metrics["paired"].values():
        assert f"+{difference['macro']:.3f}" in whole_page.text
    assert f"{metrics['router']['accuracy']:.3f} of the test prompts" in whole_page.text


def test_the_pairs_are_counted_and_what_was_cut_is_told(whole_page):
    assert (
        "900 training, 90 validation, 120 test pairs. 7 of them were too long for the model"
        in whole_page.text
    )
    assert "the two sides of 1 of these became equal, which counts as a tie." in whole_page.text


def test_training_is_told_in_words_and_phase_3_in_a_table(whole_page):
    training = whole_page.text.split("Training The loss says")[1]
    for name in ("Shared start.", "Phase 1: task adapters.", "Phase 2: capability experts."):
        assert name in training
    assert re.search(r"facts\s*0.610\s*0.625\s*0.550\s*weighted scores", training)
    assert "train_" not in training.split("Configuration")[0]


def test_an_example_explains_its_reward(whole_page):
    assert "the model agrees with the label (margin +1.690)" in whole_page.text
    assert "the model disagrees with the label (margin −1.690)" in whole_page.text
    capabilities = re.findall(r"empathy|proactivity|logic", whole_page.text.split("Examples: why")[1])
    assert capabilities[:3] == ["empathy", "proactivity", "logic"]  # by how much they tell the sides apart


def test_the_same_run_gives_the_same_file(whole_run, whole_page):
    before = (whole_run / "report.html").read_bytes()
    assert build_report(whole_run).read_bytes() == before


def test_pictures_without_the_numbers_of_the_metrics(tmp_path, whole_run):
    for name in ("best_of_n.json", "router_confusion.json"):
        (tmp_path / name).write_bytes((whole_run / name).read_bytes())
    page = page_of(tmp_path)
    assert len(page.images) == 2
    assert "accuracies, intervals and times (metrics.json)" in page.text


@pytest.mark.parametrize("name", FILES)
def test_one_file_alone_makes_a_page(tmp_path, whole_run, name):
    (tmp_path / name).write_bytes((whole_run / name).read_bytes())
    page = page_of(tmp_path)
    assert f"({name})" not in page.text
    assert all(f"({other})" in page.text for other in FILES if other != name)


def test_hostile_text_stays_text(tmp_path):
    hostile = '<script>alert(1)</script><img src="http://x/y"> "\' {{ 7*7 }} \x00 شكرا 🙂'
    pair = made_up_pair() | {"prompt": hostile, "task": hostile}
    side = {"text": hostile, "reward": 0.0, "task": hostile, "capabilities": {hostile: 1.0}}
    (tmp_path / "examples.json").write_text(json.dumps([pair | {"chosen": side, "rejected": side}]))
    (tmp_path / "config.yaml").write_bytes(b"name: \xff " + hostile.encode())
    cell = {"accuracy": 0.5, "low": 0.1, "high": 0.9, "pairs": 3}
    metrics = {"methods": {hostile: {"macro": 0.5, "tasks": {hostile: cell}}}}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    page = page_of(tmp_path)
    assert "script" not in page.tags
    assert len(page.images) == 1
    assert page.text.count("{{ 7*7 }}") >= 6
    assert "few" in page.text


def test_methods_without_tasks_make_a_page(tmp_path):
    (tmp_path / "metrics.json").write_text('{"methods": {"single": {"macro": 0.5, "tasks": {}}}}')
    assert page_of(tmp_path).images == []


def test_a_difference_is_put_into_words(tmp_path):
    paired = {
        "dmoerm-single": {"macro": 0.1, "low": 0.05, "high": 0.15},
        "dmoerm-per_task": {"macro": -0.1, "low": -0.15, "high": -0.05},
        "dmoerm-single_wide": {"macro": 0.0001, "low": -0.05, "high": 0.05},
    }
    (tmp_path / "metrics.json").write_text(json.dumps({"methods": {}, "paired": paired}))
    text = page_of(tmp_path).text
    assert "DMoERM against Single reward model: +0.100 accuracy" in text
    assert "better: the whole interval is above 0" in text
    assert "worse: the whole interval is below 0" in text
    assert "DMoERM against Single, wide: 0.000 accuracy" in text
    assert "no clear difference: the interval contains 0" in text


def test_a_wrong_route_is_told(tmp_path):
    (tmp_path / "examples.json").write_text(json.dumps([made_up_pair() | {"task": "facts"}]))
    assert "The router sent it to advice." in page_of(tmp_path).text


def test_a_log_line_cut_by_a_kill_is_left_out(tmp_path):
    whole = '{"step": 1, "phase": "phase1", "loss": 0.5}\n'
    (tmp_path / "metrics.jsonl").write_text(whole + '{"step": 2, "ph')
    assert [line.step for line in read_run(tmp_path).log] == [1]
    (tmp_path / "metrics.jsonl").write_text(whole + '{"step": 2, "ph\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: Invalid JSON"):
        build_report(tmp_path)


def test_the_curves_of_two_methods_are_kept_apart(tmp_path):
    log = [
        {"step": i, "phase": "p", "method": method, "loss": 1.0}
        for i in range(3)
        for method in ("single", "dmoerm")
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    page = page_of(tmp_path)
    assert len(page.images) == 2
    assert "DMoERM" in page.text.split("Training")[-1]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (
            "router_confusion.json",
            {"tasks": ["a"], "counts": [[1, 2]]},
            "counts has to be square, one row and",
        ),
        ("router_confusion.json", {"tasks": ["a"], "counts": [[-1]]}, "counts have to be 0 or more"),
        (
            "expert_correlation.json",
            {"t": {"experts": ["x", "y"], "matrix": [[1]]}},
            "t: .*matrix has to be square",
        ),
        ("best_of_n.json", {"dmoerm": {"n": [1]}}, "dmoerm.gold: Field required"),
        ("examples.json", {}, "Input should be a valid array"),
        ("versions.json", ["torch"], "Input should be"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, sentence):
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(DataError, match=re.escape(f"{name}: ") + sentence):
        build_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_folder_that_is_none_or_holds_nothing(tmp_path):
    with pytest.raises(
        DataError, match=r"no: is not a folder; expected .*; give the folder that training wrote"
    ):
        build_report(tmp_path / "no")
    with pytest.raises(DataError, match=r"holds no file of a run; expected at least one of metrics\.json"):
        build_report(tmp_path)


def test_a_report_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    (tmp_path / "report.html").mkdir()
    with pytest.raises(OutputError, match=r"report\.html: could not be written; Is a directory; free space"):
        build_report(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "report.html"}


def test_a_scored_pair_keeps_what_the_model_said(tmp_path):
    turns = (Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "Bye"))
    pair = PreferencePair(
        "1", turns, (Message("assistant", "Good"),), (Message("assistant", "Bad"),), task="chat"
    )
    report = RewardReport("1/chosen", 1.5, "chat", {"chat": 1.0}, {"warm": 0.5})
    example = scored_pair(pair, report, report)
    assert example.prompt == "user: Hi\n\nassistant: Hello\n\nuser: Bye"
    assert (example.chosen.text, example.chosen.reward, example.rejected.text) == ("Good", 1.5, "Bad")
    write_run_file(tmp_path / "examples.json", [example])
    assert read_run(tmp_path).examples == [example]
