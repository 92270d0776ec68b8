"""The two planted truths: words alone do not give the world away, and one model for all tasks suffers."""

import re
from collections import Counter
from statistics import mean

import pytest
import torch

from prefmoe.data.world import World
from prefmoe.nn.probe import fit_bradley_terry

NUM_TRAIN, NUM_TEST = 600, 400  # pairs of each task


def words(messages):
    return Counter(re.findall(r"[a-z]+", messages[0].content.lower()))


def word_differences(pairs, vocabulary):
    """Count of each word in the chosen completion minus that in the rejected one: (pairs, words)."""
    rows = torch.zeros(len(pairs), len(vocabulary), dtype=torch.float64)
    for row, pair in zip(rows, pairs, strict=True):
        for messages, sign in ((pair.chosen, 1), (pair.rejected, -1)):
            for word, count in words(messages).items():
                if word in vocabulary:
                    row[vocabulary[word]] += sign * count
    return rows


# 0 is the seed that the wording was tuned on; the others chose nothing.
@pytest.fixture(scope="module", params=[0, 11, 12])
def probes(request):
    """Accuracy of bag-of-words probes, fitted to all tasks (blind) or to each (oracle), on clean labels."""
    world = World(seed=request.param)
    train = world.sample_pairs(NUM_TRAIN, split="train", label_noise=False)
    test = world.sample_pairs(NUM_TEST, split="test", label_noise=False)
    seen = sorted({word for pair in train for side in (pair.chosen, pair.rejected) for word in words(side)})
    vocabulary = {word: column for column, word in enumerate(seen)}
    rows, test_rows = word_differences(train, vocabulary), word_differences(test, vocabulary)
    num_tasks = len(world.tasks)  # the tasks take turns

    def accuracy(weights, task):
        return (test_rows[task::num_tasks] @ weights > 0).double().mean().item()

    blind = fit_bradley_terry(rows, l2=0.01)
    return {
        "blind": mean(accuracy(blind, task) for task in range(num_tasks)),
        "oracle": mean(
            accuracy(fit_bradley_terry(rows[task::num_tasks], l2=0.01), task) for task in range(num_tasks)
        ),
    }


def test_counting_words_stays_under_85_percent_on_clean_labels(probes):
    assert 0.70 < probes["oracle"] < 0.85


def test_knowing_the_task_is_worth_eight_points(probes):
    assert probes["oracle"] - probes["blind"] >= 0.08
