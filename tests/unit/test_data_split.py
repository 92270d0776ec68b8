"""Splits by prompt: what happens to fractions, small tasks and bad requests."""

from collections import Counter

import pytest

from data_helpers import make_pair
from prefmoe.data.split import folds_by_prompt, prompt_hash, prompt_key, split_by_prompt
from prefmoe.errors import ConfigError


def many_pairs(num_prompts, pairs_a_prompt=1, task=None):
    return [
        make_pair(f"{task}{prompt}-{index}", f"{task} {prompt}?", task=task)
        for prompt in range(num_prompts)
        for index in range(pairs_a_prompt)
    ]


def test_each_task_is_split_in_proportion():
    pairs = many_pairs(50, 2, "a") + many_pairs(10, 1, "b")
    parts = split_by_prompt(pairs, {"phase1": 0.6, "phase3": 0.4}, seed=3)
    counts = {name: Counter(pair.task for pair in part) for name, part in parts.items()}
    assert counts == {"phase1": {"a": 60, "b": 6}, "phase3": {"a": 40, "b": 4}}


def test_three_pairs_are_enough():
    parts = split_by_prompt(many_pairs(3), {"phase1": 0.6, "phase3": 0.4}, seed=0)
    assert [len(part) for part in parts.values()] == [2, 1]


def test_one_prompt_only_goes_to_the_largest_part():
    parts = split_by_prompt(many_pairs(1, 5), {"small": 0.2, "large": 0.8}, seed=0)
    assert [len(part) for part in parts.values()] == [0, 5]


def test_a_prompt_of_two_tasks_stays_in_one_part():
    pairs = [make_pair(f"{task}{i}", f"{i}", task=task) for i in range(40) for task in ("a", "b")]
    folds = folds_by_prompt(pairs, 4, seed=0)
    assert folds[::2] == folds[1::2]
    assert Counter(folds) == dict.fromkeys(range(4), 20)


def test_seed_matters():
    pairs = many_pairs(40)
    assert folds_by_prompt(pairs, 2, seed=1) != folds_by_prompt(pairs, 2, seed=2)


def test_hash_is_the_same_in_every_process():
    assert prompt_hash(make_pair(prompt="Why?").prompt) == 15481062564550900630
    assert prompt_key(make_pair(prompt=" WHY \n not ").prompt) == "user: why not"


@pytest.mark.parametrize("fractions", [{}, {"a": 0.5}, {"a": 1.5, "b": -0.5}, {"a": 1.0, "b": 0.0}])
def test_fractions_that_do_not_work(fractions):
    with pytest.raises(ConfigError, match="expected positive numbers that sum to 1"):
        split_by_prompt(many_pairs(2), fractions, seed=0)


def test_one_fold_is_refused():
    with pytest.raises(ConfigError, match="num_folds=1 cannot be cross-fitted; choose 2 or more"):
        folds_by_prompt(many_pairs(2), 1, seed=0)
