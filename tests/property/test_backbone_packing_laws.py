"""Batches of texts are complete, fit the budget, keep prompts together and waste little."""

import random

from hypothesis import given
from hypothesis import strategies as st

from prefmoe.backbone.packing import pack_texts, packed_batches
from prefmoe.data.render import Encoded
from prefmoe.nn import attention_plan

HIDDEN = 576

ids = st.lists(st.integers(0, 2), min_size=1, max_size=30).map(tuple)
encoded = st.tuples(ids, st.integers(0, 30)).map(
    lambda drawn: Encoded(drawn[0], min(drawn[1], len(drawn[0])), 0)
)
texts_and_owners = st.lists(st.tuples(encoded, st.integers(0, 2)), min_size=1, max_size=20).map(
    lambda drawn: tuple(map(list, zip(*drawn, strict=True)))
)


def packed(texts, owners, batch):
    return pack_texts([texts[i].input_ids for i in batch], hidden=HIDDEN, owners=[owners[i] for i in batch])


@given(texts_and_owners, st.integers(1, 120))
def test_batches_hold_every_text_once_and_pack_into_the_budget(drawn, budget):
    texts, owners = drawn
    batches = list(packed_batches(texts, budget, hidden=HIDDEN, owners=owners))
    assert sorted(row for batch in batches for row in batch) == list(range(len(texts)))
    for batch in batches:
        assert len(packed(texts, owners, batch).tokens) <= budget or len(batch) == 1


@given(texts_and_owners, st.integers(1, 120))
def test_no_prompt_comes_before_one_with_a_longer_text(drawn, budget):
    texts, owners = drawn
    order = [i for batch in packed_batches(texts, budget, hidden=HIDDEN, owners=owners) for i in batch]
    prompts = [texts[i].input_ids[: texts[i].prompt_length] for i in order]
    visits = [prompt for i, prompt in enumerate(prompts) if not i or prompts[i - 1] != prompt]
    assert len(visits) == len(set(visits))
    longest = [max(len(t.input_ids) for t in texts if t.input_ids[: t.prompt_length] == p) for p in visits]
    assert longest == sorted(longest, reverse=True)


def like_real_ones(num_prompts, completions, seed):
    """Lengths as those of real pairs: log-normal, most of them short, a few at the limit."""
    rng = random.Random(seed)
    texts = []
    for _ in range(num_prompts):
        prompt = [rng.randrange(1000) for _ in range(min(400, int(rng.lognormvariate(4, 0.8)) + 10))]
        for _ in range(completions):
            number = min(512 - len(prompt), int(rng.lognormvariate(4.3, 0.8)) + 1)
            texts.append(Encoded((*prompt, *(rng.randrange(1000) for _ in range(number))), len(prompt), 0))
    return texts


def test_nothing_but_attention_sees_padding_and_that_little():
    texts = like_real_ones(60, 2, seed=0)
    packings = [
        packed(texts, [0] * len(texts), batch) for batch in packed_batches(texts, 4096, hidden=HIDDEN)
    ]
    nodes = sum(len(packing.tokens) for packing in packings)
    beginnings = {text.input_ids[: end + 1] for text in texts for end in range(len(text.input_ids))}
    assert len(beginnings) <= nodes <= 1.02 * len(beginnings)
    asked = sum(block.queries.numel() for p in packings for block in attention_plan(p))
    assert asked < 1.35 * nodes


def test_answers_to_a_long_prompt_share_it():
    rng = random.Random(1)
    prompt = tuple(rng.randrange(1000) for _ in range(400))
    texts = [Encoded((*prompt, n, *(rng.randrange(1000) for _ in range(79))), 400, 0) for n in range(16)]
    (batch,) = packed_batches(texts, 8192, hidden=HIDDEN)
    assert len(packed(texts, [0] * 16, batch).tokens) == 400 + 16 * 80


def test_a_budget_bounds_the_copies_of_keys_too():
    """64 answers of 10 tokens to a prompt of 2,000: few tokens, but each answer attends to the whole prompt."""
    prompt = tuple(range(2000))
    texts = [Encoded((*prompt, 2000 + n, *range(9)), 2000, 0) for n in range(64)]
    batches = list(packed_batches(texts, 4096, hidden=HIDDEN))
    assert max(map(len, batches)) == (8 * 4096 + 7) // 2010
