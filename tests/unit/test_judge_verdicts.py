"""Both orders together: labels, quality, and what arithmetic says of them."""

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from judge_helpers import interview, pair
from prefmoe.data.world import World
from prefmoe.labeling import TaskFile
from prefmoe.labeling.files import SourceRow
from prefmoe.labeling.judge.answers import Answer
from prefmoe.labeling.judge.comparison import compare_all, gather_labels, length_band
from prefmoe.labeling.judge.intervals import clustered_bootstrap, clustered_share, cohens_kappa
from prefmoe.labeling.judge.labeler import JudgeLabeler
from prefmoe.labeling.judge.questions import hash_pair
from prefmoe.labeling.judge.settings import JudgeSettings
from prefmoe.labeling.judge.store import AnswerStore, Call, Stored
from prefmoe.labeling.judge.verdicts import Verdict, calibrate, collect_verdicts, measure_points

BAD = Answer(None, "refused")


def verdict(given, swapped, *, probabilities=(None, None)):
    first, second = (
        one if isinstance(one, Answer) else Answer(one, None, one, mass)
        for one, mass in zip((given, swapped), probabilities, strict=True)
    )
    return Verdict("chat", first, second)


@pytest.mark.parametrize(
    ("given", "swapped", "label"),
    [
        ("1", "2", 1),
        ("2", "1", -1),
        ("0", "0", 0),
        ("1", "1", None),
        ("2", "2", None),
        ("1", "0", None),
        ("0", "2", None),
    ],
)
def test_a_label_is_kept_where_both_orders_agree(given, swapped, label):
    assert verdict(given, swapped).label == label


def test_an_unusable_answer_gives_no_label():
    assert verdict("1", BAD).label is None
    assert verdict(BAD, BAD).label is None
    assert verdict(BAD, BAD).sides == (None, None)


def test_the_soft_label_is_the_mean_of_both_orders():
    both = verdict("1", "1", probabilities=((0.8, 0.2, 0.0), (0.5, 0.3, 0.2)))
    assert both.chosen_probability == pytest.approx((0.8 + 0.3 + 0.1) / 2)
    assert verdict("1", "1").chosen_probability is None


def test_a_judge_that_only_likes_the_first_place_has_a_soft_label_of_one_half():
    assert verdict("1", "1", probabilities=((0.9, 0.1, 0.0),) * 2).chosen_probability == pytest.approx(0.5)


def stored(group, point, swapped, choice, one="pair"):
    return Stored("m", group, one, one, "chat", point, swapped, Answer(choice))


def test_only_questions_with_both_orders_count_and_the_newest_wording_wins():
    answers = [
        stored("old", "wit", False, "1"),
        stored("old", "wit", True, "2"),
        stored("new", "wit", True, "1"),
        stored("half", "wit", True, "2"),
        stored("new", "wit", False, "2"),
    ]
    verdicts = collect_verdicts(answers)
    assert verdicts["pair"]["wit"].label == -1
    assert collect_verdicts(answers, groups=["old"])["pair"]["wit"].label == 1
    assert collect_verdicts(answers, groups=["half"]) == {}


def test_quality_counts_by_hand():
    verdicts = {
        "a": {"wit": verdict("1", "2")},
        "b": {"wit": verdict("1", "1")},
        "c": {"wit": verdict("0", "0")},
        "d": {"wit": verdict("1", BAD)},
    }
    (quality,) = measure_points(verdicts)
    assert (quality.task, quality.point, quality.pairs) == ("chat", "wit", 4)
    assert quality.agreement.value == pytest.approx(2 / 3)
    assert quality.first.value == pytest.approx(4 / 5)
    assert quality.first.low < quality.first.value < quality.first.high
    assert quality.ties == pytest.approx(2 / 7)
    assert quality.labels == {1: 1, 0: 1}
    assert quality.kept == 0.5
    assert quality.reasons == {"refused": 1}


def test_how_often_soft_labels_side_with_people():
    """By hand: 0.85 for the chosen side, 0.15, and 0.5, also where the two orders disagree."""
    sure = ((0.9, 0.1, 0.0), (0.2, 0.8, 0.0))
    verdicts = {
        "a": {"wit": verdict("1", "2", probabilities=sure)},
        "c": {"wit": verdict("1", "1", probabilities=((0.9, 0.1, 0.0),) * 2)},
        "d": {"wit": verdict("1", "2")},
    }
    (quality,) = measure_points(verdicts)
    assert quality.soft_chosen.value == pytest.approx((1 + 0.5) / 2)
    wrong = verdict("2", "1", probabilities=((0.2, 0.8, 0.0), (0.9, 0.1, 0.0)))
    (quality,) = measure_points(verdicts | {"b": {"wit": wrong}})
    assert quality.soft_chosen.value == pytest.approx((1 + 0 + 0.5) / 3)
    assert quality.soft_chosen.low < 0.5 < quality.soft_chosen.high
    assert measure_points({"d": verdicts["d"]})[0].soft_chosen is None


def test_quality_of_a_point_without_usable_answers():
    (quality,) = measure_points({"a": {"wit": verdict(BAD, BAD)}})
    assert (quality.agreement, quality.first, quality.ties, quality.kept) == (None, None, None, 0.0)


def test_calibration_takes_a_preference_for_a_place_out():
    """A judge that always says "1", but says it more surely where the chosen side stands first."""
    verdicts = {
        str(i): {"wit": verdict("1", "1", probabilities=((0.9, 0.1, 0.0), (0.7, 0.3, 0.0)))} for i in range(5)
    } | {"other": {"wit": verdict("1", "1", probabilities=((0.6, 0.4, 0.0), (0.95, 0.05, 0.0)))}}
    assert {v["wit"].label for v in verdicts.values()} == {None}
    calibrated = calibrate(verdicts)
    assert [v["wit"].label for v in calibrated.values()] == [1] * 5 + [-1]


def test_calibration_leaves_an_unbiased_judge_ties_and_unknown_probabilities_alone():
    fair = {
        "a": {"wit": verdict("1", "2", probabilities=((0.8, 0.2, 0.0), (0.2, 0.8, 0.0)))},
        "b": {"wit": verdict("2", "1", probabilities=((0.2, 0.8, 0.0), (0.8, 0.2, 0.0)))},
        "c": {"wit": verdict("0", "0", probabilities=((0.2, 0.2, 0.6), (0.2, 0.2, 0.6)))},
        "d": {"wit": verdict("1", BAD)},
    }
    assert calibrate(fair) == fair


def test_keeping_what_agrees_raises_accuracy_as_arithmetic_predicts(tmp_path):
    """A scripted judge on the simulated world: right in 75 of 100 answers, 15 points better where the better side is
    shown first (90 and 60).

    Its two answers are independent, so both are right with 0.9 * 0.6 = 0.54, both wrong with 0.1 * 0.4 = 0.04, and
    the orders agree on 0.58 of the pairs, 0.54 / 0.58 = 0.931 of them rightly: 18.1 points more than a single answer.
    """
    sampled = [
        one for one in World().sample_pairs(1500, split="train", label_noise=False) if one.task == "advice"
    ]
    points = sorted(sampled[0].capabilities)
    tasks = TaskFile.model_validate(
        {
            "tasks": {
                "advice": {"description": "Advice.", "capabilities": dict.fromkeys(points, "It is better.")}
            }
        }
    )
    truth = {hash_pair(one): dict(one.capabilities) for one in sampled}
    draw = random.Random(1)
    single = Counter()
    with AnswerStore(tmp_path / "s.sqlite") as store:
        labeler = JudgeLabeler(JudgeSettings(judge="m"), tasks, store, skip_labelled=False)
        calls = []
        for one in sampled:
            for question in labeler.interview.questions(one):
                side = truth[question.pair][question.points[0]]
                if side == 0:
                    continue
                better_first = (side == 1) != question.swapped
                right = draw.random() < (0.9 if better_first else 0.6)
                single[right] += 1
                choice = "1" if right == better_first else "2"
                calls.append(Call(question, {question.points[0]: Answer(choice)}, 1, 1, 0.0))
        store.record(calls)
        verdicts = labeler.verdicts(sampled)
    kept = [
        v.label == truth[key][point]
        for key, found in verdicts.items()
        for point, v in found.items()
        if v.label is not None
    ]
    asked = sum(len(found) for found in verdicts.values())
    assert asked > 2500
    assert single[True] / single.total() == pytest.approx(0.75, abs=0.02)
    assert len(kept) / asked == pytest.approx(0.58, abs=0.03)
    assert sum(kept) / len(kept) == pytest.approx(0.54 / 0.58, abs=0.015)
    biases = [quality.first for quality in measure_points(verdicts)]
    assert all(bias.low - 0.02 < 0.65 < bias.high + 0.02 for bias in biases)


def kappa(table):
    return float(cohens_kappa(np.array(table, dtype=float)))


def test_kappa_by_hand():
    # Cohen's own kind of example: 45 of 100 agree on yes, 15 on no; chance agrees on 0.54.
    assert kappa([45, 15, 25, 15]) == pytest.approx((0.6 - 0.54) / (1 - 0.54))
    assert kappa([5, 0, 0, 5]) == 1
    assert kappa([0, 5, 5, 0]) == -1
    assert kappa([25, 25, 25, 25]) == pytest.approx(0)
    assert kappa([7, 0, 0, 0]) == 0


@given(st.lists(st.integers(0, 50), min_size=9, max_size=9).filter(any))
def test_kappa_does_not_care_who_is_first(cells):
    table = np.array(cells).reshape(3, 3)
    assert kappa(table.ravel()) == pytest.approx(kappa(table.T.ravel()))
    assert -1 - 1e-9 <= kappa(cells) <= 1 + 1e-9


def test_intervals_of_whole_clusters_are_wider():
    hits = [1, 0] * 100
    alone = clustered_share(hits, [1] * 200, seed=0)
    together = clustered_share([20 * h for h in hits[:10]], [20] * 10, seed=0)
    assert alone.value == together.value == 0.5
    assert together.high - together.low > 3 * (alone.high - alone.low)
    assert clustered_share([], [], seed=0) is None


def test_a_share_of_all_or_none_still_leaves_doubt_by_the_number_of_clusters():
    # Wilson by hand, 60 of 60: 1 - 1.96^2 / (60 + 1.96^2)
    assert clustered_share([2] * 60, [2] * 60, seed=0) == pytest.approx((1.0, 0.93983, 1.0), abs=1e-5)
    assert clustered_share([0] * 60, [2] * 60, seed=0) == pytest.approx((0.0, 0.0, 0.06017), abs=1e-5)
    assert clustered_share([1, 0], [1, 0], seed=0).low == pytest.approx(1 - 1.96**2 / (1 + 1.96**2))


def test_95_percent_intervals_hold_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(0)
    held = 0
    for trial in range(100):
        hits = rng.random(80) < 0.7
        interval = clustered_bootstrap(
            np.stack([hits, np.ones(80)], axis=1), lambda sums: sums[..., 0] / sums[..., 1], seed=trial
        )
        held += interval.low <= 0.7 <= interval.high
    assert 88 <= held <= 99


def row(one, **labeled_by):
    return SourceRow(one, {}, {point: labeled_by.get(point, "rows") for point in one.capabilities})


def test_labelers_are_compared_by_point_length_and_pair():
    rows = [
        row(pair("a", chosen="long " * 9, rejected="short", capabilities={"wit": 1, "brevity": -1})),
        row(pair("b", chosen="short", rejected="long " * 9, capabilities={"wit": 1})),
        row(pair("c", capabilities={"wit": 0})),
    ]
    flip = {"1": "2", "2": "1"}
    judged = {
        hash_pair(rows[0].pair): {"wit": verdict("1", "2"), "brevity": verdict("1", "2")},
        hash_pair(rows[1].pair): {"wit": verdict("2", flip["2"])},
        hash_pair(rows[2].pair): {"wit": verdict("1", "2")},
    }
    (found,) = compare_all([one.pair for one in rows], gather_labels(rows, {"m": judged}))
    assert (found.first, found.second) == ("m", "rows")
    assert found.points["chat", "wit"].pairs == 3
    assert found.points["chat", "wit"].agreement == pytest.approx(1 / 3)
    assert found.points["chat", "brevity"].agreement == 0
    assert found.lengths["chosen longer"].agreement == 0.5
    assert found.lengths["rejected longer"].agreement == 0
    # a: brevity -1 and 1 differ by 2; b: 1 and -1 too; c: 0 and 1 by 1
    assert found.disputed == [("a", ["brevity"]), ("b", ["wit"]), ("c", ["wit"])]


def test_labels_that_a_judge_added_are_its_own_and_not_the_rows():
    labelled = pair("a", capabilities={"wit": 1, "brevity": 1})
    sources = gather_labels([row(labelled, wit="m")], {})
    assert {name: next(iter(found.values())) for name, found in sources.items()} == {
        "m": {"wit": 1},
        "rows": {"brevity": 1},
    }
    assert compare_all([labelled], sources) == []


def test_about_equal_is_a_tenth():
    assert length_band(pair(chosen="x" * 100, rejected="y" * 90)) == "about equal"
    assert length_band(pair(chosen="x" * 100, rejected="y" * 89)) == "chosen longer"


def test_an_interview_without_points_of_a_task_asks_nothing():
    assert list(interview(points={"chat": ()}).questions(pair())) == []
