"""Laws of pooling, for any mask."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefmoe.nn import mean_tokens, pack_left
from prefmoe.nn.pooling import pad_left
from reference import pooling as slow

laws = settings(deadline=None)


@st.composite
def masks(draw, min_real=0):
    batch, seq = draw(st.integers(1, 4)), draw(st.integers(max(min_real, 1), 7))
    row = st.lists(st.booleans(), min_size=seq, max_size=seq).filter(lambda r: sum(r) >= min_real)
    return torch.tensor(draw(st.lists(row, min_size=batch, max_size=batch)))


@st.composite
def spans(draw):
    """States of some rows, and a span in each (possibly empty)."""
    batch, seq, hidden = draw(st.integers(1, 4)), draw(st.integers(1, 7)), draw(st.integers(1, 3))
    values = st.lists(st.floats(-100, 100), min_size=batch * seq * hidden, max_size=batch * seq * hidden)
    states = torch.tensor(draw(values), dtype=torch.float64).view(batch, seq, hidden)
    ends = draw(st.lists(st.integers(1, seq), min_size=batch, max_size=batch))
    starts = [draw(st.integers(0, seq)) for _ in ends]
    return states, torch.tensor(starts), torch.tensor(ends)


def ids_like(mask):
    return torch.arange(mask.numel()).view(mask.shape) + 10


@laws
@given(masks())
def test_packing_equals_its_slow_twin_and_loses_no_token(mask):
    packed, lengths = pack_left(ids_like(mask), mask)
    assert (packed.tolist(), lengths.tolist()) == slow.pack_left(ids_like(mask).tolist(), mask.tolist())
    assert torch.equal(packed.sort(dim=1).values, ids_like(mask))


@laws
@given(masks())
def test_packing_twice_is_packing_once(mask):
    once, lengths = pack_left(ids_like(mask), mask)
    right_padded = torch.arange(mask.shape[1]) < lengths.unsqueeze(1)
    twice, again = pack_left(once, right_padded)
    assert torch.equal(twice, once)
    assert torch.equal(again, lengths)


@laws
@given(masks())
def test_states_move_as_their_tokens_do_and_integer_masks_count(mask):
    ids = ids_like(mask)
    states = torch.stack([ids, -ids], dim=2).float()
    packed_states, _ = pack_left(states, mask)
    packed_ids, _ = pack_left(ids, mask.long())
    assert torch.equal(packed_states[..., 0], packed_ids.float())
    assert torch.equal(packed_states[..., 1], -packed_ids.float())


@laws
@given(masks(min_real=1), st.integers(0, 3), st.integers(0, 3))
def test_more_padding_on_either_side_changes_no_pooled_state(mask, left, right):
    states = ids_like(mask).double().unsqueeze(2)
    wide_states = torch.nn.functional.pad(states, (0, 0, left, right), value=float("nan"))
    wide_mask = torch.nn.functional.pad(mask, (left, right), value=False)
    narrow, lengths = pack_left(states, mask)
    wide, wide_lengths = pack_left(wide_states, wide_mask)
    assert torch.equal(mean_tokens(wide, wide_lengths, wide_lengths), mean_tokens(narrow, lengths, lengths))
    zeros = torch.zeros_like(lengths)
    assert torch.equal(mean_tokens(wide, zeros, wide_lengths), mean_tokens(narrow, zeros, lengths))


@laws
@given(spans())
def test_pooling_equals_its_slow_twin(arguments):
    states, starts, ends = arguments
    expected = slow.mean_tokens(states.tolist(), starts.tolist(), ends.tolist())
    torch.testing.assert_close(mean_tokens(states, starts, ends).tolist(), expected)


@laws
@given(spans())
def test_an_empty_span_falls_back_to_the_last_token_before_it(arguments):
    states, _, ends = arguments
    assert torch.equal(mean_tokens(states, ends, ends), states[torch.arange(len(ends)), ends - 1])


@laws
@given(spans())
def test_what_lies_outside_the_span_is_never_read(arguments):
    states, starts, ends = arguments
    starts = torch.minimum(starts, ends - 1)
    positions = torch.arange(states.shape[1])
    inside = ((positions >= starts[:, None]) & (positions < ends[:, None])).unsqueeze(2)
    broken = states.where(inside, float("nan")).requires_grad_()
    pooled = mean_tokens(broken, starts, ends)
    assert torch.equal(pooled, mean_tokens(states, starts, ends))
    pooled.sum().backward()
    assert (broken.grad[~inside.expand_as(states)] == 0).all()


@given(st.lists(st.lists(st.integers(0, 99), max_size=6), min_size=1, max_size=5))
def test_padding_on_the_left_is_its_slow_twin_and_loses_nothing(rows):
    ids, mask = pad_left([torch.tensor(row, dtype=torch.long) for row in rows])
    assert (ids.tolist(), mask.tolist()) == slow.pad_left(rows)
    for row, padded, kept in zip(rows, ids, mask, strict=True):
        assert padded[kept.bool()].tolist() == row
