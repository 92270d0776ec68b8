"""Laws of LoraBank.select and LoraBank.mix, for any bank, any choice and any weights of experts."""

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


@st.composite
def mixtures(draw, dtype=torch.float64):
    """A bank with random B, tokens, and weights of all experts that need not sum to 1."""
    sizes = st.integers(1, 4)
    num_experts, rank, in_features, out_features = (draw(sizes) for _ in range(4))
    torch.manual_seed(draw(st.integers(0, 1000)))
    bank = LoraBank(
        in_features,
        out_features,
        num_experts=num_experts,
        rank=rank,
        alpha=draw(st.floats(0.5, 8)),
        dtype=dtype,
    )
    torch.nn.init.normal_(bank.B)
    num_tokens = draw(st.integers(1, 9))  # fewer than twice the rank and more: both ways of `expand`
    return (
        bank,
        torch.randn(num_tokens, in_features, dtype=dtype),
        torch.rand(num_tokens, num_experts, dtype=dtype),
    )


def slow_mix(bank, x, weights):
    expected = slow.mix(
        x.tolist(), bank.A.tolist(), bank.B.tolist(), weights.tolist(), alpha=bank.alpha, rank=bank.rank
    )
    return torch.tensor(expected, dtype=torch.float64)


@laws
@given(mixtures())
def test_mix_equals_its_slow_twin(case):
    torch.testing.assert_close(case[0].mix(*case[1:]), slow_mix(*case))


@laws
@given(mixtures(torch.float32))
def test_mix_in_float32_equals_the_loop_over_experts_to_a_hundred_thousandth(case):
    torch.testing.assert_close(case[0].mix(*case[1:]).double(), slow_mix(*case), rtol=1e-5, atol=1e-5)


@laws
@given(mixtures())
def test_mix_with_one_expert_at_weight_1_is_select(case):
    bank, x, weights = case
    for expert in range(bank.num_experts):
        alone = torch.zeros_like(weights).index_fill(1, torch.tensor([expert]), 1.0)
        selected = bank.select(x[:, None], torch.full((len(x),), expert))[:, 0]
        torch.testing.assert_close(bank.mix(x, alone), selected)


@laws
@given(mixtures())
def test_no_weight_on_any_expert_adds_exactly_nothing(case):
    bank, x, weights = case
    base = torch.randn(len(x), bank.out_features, dtype=torch.float64)
    assert torch.equal(base + bank.mix(x, torch.zeros_like(weights)), base)


@laws
@given(mixtures())
def test_a_mixture_in_a_new_bank_adds_exactly_nothing(case):
    bank, x, weights = case
    torch.nn.init.zeros_(bank.B)
    assert not bank.mix(x, weights).any()


@laws
@given(mixtures(), st.randoms(use_true_random=False))
def test_permuting_experts_and_their_weights_changes_no_mixture(case, random):
    bank, x, weights = case
    places = random.sample(range(bank.num_experts), bank.num_experts)
    before = bank.mix(x, weights)
    with torch.no_grad():
        for parameter in (bank.A, bank.B):
            parameter.copy_(parameter[places])
    torch.testing.assert_close(bank.mix(x, weights[:, places]), before)


@laws
@given(mixtures())
def test_mix_of_a_batch_equals_its_tokens_one_by_one_in_any_shape(case):
    bank, x, weights = case
    whole = bank.mix(x, weights)
    torch.testing.assert_close(bank.mix(x[None, :, None], weights[None, :, None])[0, :, 0], whole)
    one_by_one = [bank.mix(token, shares) for token, shares in zip(x, weights, strict=True)]
    torch.testing.assert_close(torch.stack(one_by_one), whole)


@laws
@given(mixtures())
def test_an_expert_without_weight_gets_no_gradient(case):
    bank, x, weights = case
    bank.mix(x, weights.index_fill(1, torch.tensor([0]), 0.0)).sum().backward()
    assert not bank.A.grad[0].any()
    assert not bank.B.grad[0].any()
