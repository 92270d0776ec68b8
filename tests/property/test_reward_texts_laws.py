"""Batches of texts are complete, fit the budget and waste little of it."""

from hypothesis import given
from hypothesis import strategies as st

from prefmoe.reward.texts import token_budget_batches

lengths = st.lists(st.integers(1, 50), max_size=30)


@given(lengths, st.integers(1, 120))
def test_batches_hold_every_row_once_and_stay_within_the_budget(lengths, budget):
    batches = list(token_budget_batches(lengths, budget))
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[row] for row in batch)
        assert longest * len(batch) <= budget or len(batch) == 1
    longest = [max(lengths[row] for row in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)


@given(lengths, st.integers(1, 120))
def test_no_batch_could_have_taken_the_next_row_too(lengths, budget):
    batches = list(token_budget_batches(lengths, budget))
    for batch in batches[:-1]:
        assert max(lengths[row] for row in batch) * (len(batch) + 1) > budget
