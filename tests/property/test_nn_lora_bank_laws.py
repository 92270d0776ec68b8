"""Laws of LoraBank.select, for any bank and any choice of experts."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefmoe.nn import LoraBank
from reference import lora_bank as slow

laws = settings(deadline=None)


@st.composite
def cases(draw):
    """A float64 bank with random B, inputs, and the expert of each row."""
    sizes = st.integers(1, 4)
    num_experts, rank, in_features, out_features = (draw(sizes) for _ in range(4))
    torch.manual_seed(draw(st.integers(0, 1000)))
    bank = LoraBank(
        in_features, out_features, num_experts=num_experts, rank=rank, alpha=draw(st.floats(0.5, 8))
    ).double()
    torch.nn.init.normal_(bank.B)
    expert_ids = draw(st.lists(st.integers(0, num_experts - 1), min_size=1, max_size=5))
    x = torch.randn(len(expert_ids), draw(sizes), in_features, dtype=torch.float64)
    return bank, x, torch.tensor(expert_ids)


@laws
@given(cases())
def test_select_equals_its_slow_twin(case):
    bank, x, expert_ids = case
    expected = slow.select(
        x.tolist(), bank.A.tolist(), bank.B.tolist(), expert_ids.tolist(), alpha=bank.alpha, rank=bank.rank
    )
    torch.testing.assert_close(bank.select(x, expert_ids), torch.tensor(expected, dtype=torch.float64))


@laws
@given(cases())
def test_a_new_expert_adds_exactly_nothing(case):
    bank, x, expert_ids = case
    for expert in expert_ids.unique().tolist():
        bank.reset_expert(expert)
    base = torch.randn(*x.shape[:2], bank.out_features, dtype=torch.float64)
    assert torch.equal(base + bank.select(x, expert_ids), base)


@laws
@given(cases())
def test_a_batch_equals_its_rows_one_by_one(case):
    bank, x, expert_ids = case
    rows = [bank.select(x[i : i + 1], expert_ids[i : i + 1]) for i in range(len(x))]
    torch.testing.assert_close(bank.select(x, expert_ids), torch.cat(rows))


@laws
@given(cases(), st.randoms(use_true_random=False))
def test_the_order_of_experts_in_the_bank_does_not_matter(case, random):
    bank, x, expert_ids = case
    before = bank.select(x, expert_ids)
    states = [bank.expert_state(expert) for expert in range(bank.num_experts)]
    places = random.sample(range(bank.num_experts), bank.num_experts)
    for expert, place in enumerate(places):
        bank.load_expert(place, states[expert])
    assert torch.equal(bank.select(x, torch.tensor(places)[expert_ids]), before)


@laws
@given(cases())
def test_delta_weight_is_what_select_does_and_has_the_rank_of_the_expert(case):
    bank, x, expert_ids = case
    deltas = torch.stack([bank.delta_weight(expert) for expert in expert_ids.tolist()])
    torch.testing.assert_close(bank.select(x, expert_ids), torch.bmm(x, deltas.transpose(1, 2)))
    assert (torch.linalg.matrix_rank(deltas) <= bank.rank).all()


@laws
@given(cases())
def test_the_gradient_reaches_the_selected_experts_and_no_other(case):
    bank, x, expert_ids = case
    bank.select(x, expert_ids).sum().backward()
    chosen = torch.zeros(bank.num_experts, dtype=torch.bool).index_fill(0, expert_ids, True)
    for parameter in (bank.A, bank.B):
        touched = parameter.grad.flatten(1).abs().sum(dim=1) > 0
        assert torch.equal(touched, chosen)


@laws
@given(cases())
def test_an_expert_saved_and_loaded_is_bitwise_the_same(case):
    bank, _, _ = case
    other = LoraBank(
        bank.in_features, bank.out_features, num_experts=1, rank=bank.rank, alpha=bank.alpha
    ).double()
    other.load_expert(0, bank.expert_state(bank.num_experts - 1))
    assert torch.equal(other.A[0], bank.A[-1])
    assert torch.equal(other.B[0], bank.B[-1])
