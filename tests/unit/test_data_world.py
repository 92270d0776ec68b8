"""The simulated world: what is planted is what is written, in every sample and for every seed."""

import re
from collections import Counter
from itertools import combinations
from random import Random
from statistics import mean, pstdev

import pytest

from prefmoe.data.world import World
from prefmoe.data.world_phrases import CONTENT, HEDGES, ORNAMENTS
from prefmoe.data.world_text import STYLES, all_prompts, compose
from prefmoe.errors import ConfigError

SPLITS = ("train", "validation", "test")
WORLD = World(seed=3)


def test_there_are_three_tasks_with_three_capabilities_and_four_styles():
    assert WORLD.tasks == ("advice", "facts", "writing")
    assert all(len(WORLD.capabilities[task]) == 3 for task in WORLD.tasks)
    assert WORLD.styles == ("brevity", "hedging", "warmth", "ornament")


def test_no_prompt_stands_in_two_splits_or_tasks_whatever_the_seeds():
    parts = [
        set(World(seed).prompts(task, split)) for seed, split in enumerate(SPLITS) for task in WORLD.tasks
    ]
    assert all(first.isdisjoint(second) for first, second in combinations(parts, 2))
    assert all(len(part) > 200 for part in parts)


def test_the_seed_changes_the_order_of_the_prompts_and_nothing_else():
    first, second = World(0).prompts("facts", "test"), World(1).prompts("facts", "test")
    assert first != second
    assert sorted(first) == sorted(second)


def test_same_seed_same_pairs_and_other_seed_other_pairs():
    first, again, other = (World(seed).sample_pairs(5, split="train", label_noise=True) for seed in (0, 0, 1))
    assert first == again
    assert not {pair.chosen for pair in first} & {pair.chosen for pair in other}


def test_a_small_sample_is_the_beginning_of_a_large_one():
    small, large = (WORLD.sample_pairs(size, split="test", label_noise=True) for size in (4, 9))
    assert small == large[: len(small)]


@pytest.mark.parametrize("split", SPLITS)
def test_pairs_use_the_prompts_of_their_split_and_all_tasks_equally(split):
    pairs = WORLD.sample_pairs(30, split=split, label_noise=False)
    assert Counter(pair.task for pair in pairs) == dict.fromkeys(WORLD.tasks, 30)
    assert len({pair.id for pair in pairs}) == len({pair.prompt for pair in pairs}) == 90
    assert all(pair.prompt[0].content in WORLD.prompts(pair.task, split) for pair in pairs)
    assert all(tuple(pair.capabilities) == WORLD.capabilities[pair.task] for pair in pairs)
    assert all(pair.chosen != pair.rejected for pair in pairs)


def test_prompts_repeat_when_there_are_more_pairs_than_prompts():
    pairs = WORLD.sample_pairs(240, split="validation", label_noise=False)
    assert {pair.prompt[0].content for pair in pairs if pair.task == "facts"} == set(
        WORLD.prompts("facts", "validation")
    )
    assert len({pair.chosen for pair in pairs}) == len(pairs)


def test_noise_changes_labels_and_no_text():
    clean, noisy = (WORLD.sample_pairs(40, split="train", label_noise=noise) for noise in (False, True))
    assert [{pair.chosen, pair.rejected} for pair in clean] == [
        {pair.chosen, pair.rejected} for pair in noisy
    ]
    assert clean != noisy


def test_about_70_percent_of_the_noisy_labels_agree_with_the_truth():
    clean, noisy = (WORLD.sample_pairs(500, split="train", label_noise=noise) for noise in (False, True))
    is_swapped = [a.chosen != b.chosen for a, b in zip(clean, noisy, strict=True)]
    assert 1 - mean(is_swapped) == pytest.approx(0.70, abs=0.04)
    straight = [pair.swap() if swapped else pair for pair, swapped in zip(noisy, is_swapped, strict=True)]
    agrees = [
        a.capabilities[name] == b.capabilities[name]
        for a, b in zip(clean, straight, strict=True)
        for name in a.capabilities
        if a.capabilities[name] != 0
    ]
    assert mean(agrees) == pytest.approx(0.70, abs=0.04)


def test_equal_levels_are_ties_with_and_without_noise():
    clean, noisy = (WORLD.sample_pairs(60, split="train", label_noise=noise) for noise in (False, True))
    ties = [
        [[side == 0 for side in pair.capabilities.values()] for pair in pairs] for pairs in (clean, noisy)
    ]
    assert ties[0] == ties[1]
    assert 0.2 < mean(tie for pair in ties[0] for tie in pair) < 0.5


@pytest.mark.parametrize("task", WORLD.tasks)
def test_more_of_a_capability_is_better_in_its_task(task):
    levels = dict.fromkeys((*WORLD.capabilities[task], *STYLES), 1)
    assert WORLD.gold_reward(task, levels) == 0.0
    for name in WORLD.capabilities[task]:
        assert WORLD.gold_reward(task, levels | {name: 2}) > 0.2
        assert WORLD.gold_reward(task, levels | {name: 0}) < -0.2


@pytest.mark.parametrize("style", STYLES)
def test_what_a_style_gains_in_one_task_it_loses_in_others(style):
    gains = []
    for task in WORLD.tasks:
        levels = dict.fromkeys((*WORLD.capabilities[task], *STYLES), 1)
        gains.append(WORLD.gold_reward(task, levels | {style: 2}))
    assert min(gains) < -0.1
    assert max(gains) > 0.2
    assert sum(gains) == pytest.approx(0.0, abs=0.1)


def test_completions_carry_their_gold_reward_and_levels_and_are_standardized():
    rows = WORLD.sample_completions(60, 5, split="test")
    assert len({row.id for row in rows}) == 3 * 60 * 5
    for task in WORLD.tasks:
        golds = [row.gold for row in rows if row.task == task]
        assert mean(golds) == pytest.approx(0.0, abs=0.2)
        assert pstdev(golds) == pytest.approx(1.0, abs=0.15)
    assert all(row.gold == WORLD.gold_reward(row.task, row.levels) for row in rows)


def test_completions_of_a_prompt_stand_in_a_row_and_differ():
    rows = WORLD.sample_completions(2, 3, split="validation")
    groups = [rows[start : start + 3] for start in range(0, len(rows), 3)]
    assert len(groups) == 6
    assert all(len({row.prompt for row in group}) == 1 for group in groups)
    assert all(len({row.completion for row in group}) == 3 for group in groups)


def test_texts_are_readable():
    rows = WORLD.sample_completions(80, 2, split="train")
    for row in rows:
        text = row.completion[0].content
        assert 30 <= len(text.split()) <= 80
        assert not re.search(r"[\[\]{}|]|  | ,|\.\.|[.?] [a-z]", text), text
        assert re.fullmatch(r"[A-Z].*\.", text)
    prompts = [text for task in WORLD.tasks for split in SPLITS for text in WORLD.prompts(task, split)]
    assert all(re.fullmatch(r"[A-Z][^\[\]{}|]*[.?]", text) for text in prompts)


def written_cues(text, cues, side):
    """How many of the cues stand in the text, counted by a pattern made of the phrase."""
    patterns = [
        re.sub(r"\\\[(.*?)\\\]|\\\{\w+\\\}", _alternatives, re.escape(getattr(cue, side))) for cue in cues
    ]
    return sum(bool(re.search(rf"\b{pattern}(?!\w)", text, re.IGNORECASE)) for pattern in patterns)


def _alternatives(found):
    return f"(?:{found[1].replace(chr(92) + '|', '|')})" if found[1] else r"[\w ]+?"


def test_the_levels_are_written_in_the_text():
    rng = Random(0)
    for prompt in rng.sample(all_prompts("writing"), 60):
        levels = {name: rng.randint(0, 2) for name in (*CONTENT, *STYLES)}
        text = compose(prompt, levels, rng)
        for name, cues in (CONTENT | {"hedging": HEDGES, "ornament": ORNAMENTS}).items():
            shown = written_cues(text, cues, "high"), written_cues(text, cues, "low")
            assert shown == (levels[name], 2 - levels[name]), (name, text)


def test_what_is_empathy_in_advice_is_a_lack_of_objectiveness_in_facts():
    """The tasks conflict about the same phrases."""
    for row in World(seed=0).sample_completions(60, 1, split="train"):
        shown = written_cues(row.completion[0].content, CONTENT["heart"], "high")
        if row.task == "facts":
            assert row.levels["objectiveness"] == 2 - shown
        else:
            assert row.levels["empathy" if row.task == "advice" else "expressiveness"] == shown


def test_a_brief_completion_is_shorter():
    prompt = all_prompts("facts")[0]
    levels = dict.fromkeys((*CONTENT, *STYLES), 1)
    sizes = [
        mean(len(compose(prompt, levels | {"brevity": level}, Random(i)).split()) for i in range(50))
        for level in (0, 1, 2)
    ]
    assert sizes[0] > sizes[1] + 3 > sizes[2] + 6


def test_the_corpus_is_training_prompts_with_completions_of_all_tasks():
    texts = list(WORLD.corpus(30))
    assert len(set(texts)) == 30
    prompts = [text.split("\n\n")[0] for text in texts]
    for turn, prompt in enumerate(prompts):
        assert prompt in WORLD.prompts(WORLD.tasks[turn % 3], "train")
    assert texts == list(WORLD.corpus(60))[:30]


def test_a_wrong_split_task_or_level_stops_with_a_sentence():
    with pytest.raises(ConfigError, match="unknown split 'dev'; expected one of train, validation, test"):
        WORLD.sample_pairs(1, split="dev", label_noise=False)
    with pytest.raises(ConfigError, match="unknown task 'poetry'; expected one of advice, facts, writing"):
        WORLD.prompts("poetry", "train")
    with pytest.raises(ConfigError, match="unknown task 'poetry'"):
        WORLD.gold_reward("poetry", {})
    with pytest.raises(ConfigError, match=r"do not fit task 'facts'.*give one level for each"):
        WORLD.gold_reward("facts", {"depth": 2})
