"""LoraBank adds exactly what peft's LoRA adds, its gradients are right, and bfloat16 stays close."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from prefmoe.nn import LoraBank

NUM_EXPERTS, RANK, ALPHA, IN, OUT = 3, 2, 5.0, 6, 4


@pytest.fixture
def bank():
    torch.manual_seed(0)
    bank = LoraBank(IN, OUT, num_experts=NUM_EXPERTS, rank=RANK, alpha=ALPHA)
    nn.init.normal_(bank.B)
    return bank


def peft_model(bank):
    """A linear layer with one peft adapter for each expert of the bank, with the same weights."""
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["linear"], lora_dropout=0.0)
    base = nn.Sequential()
    base.add_module("linear", nn.Linear(IN, OUT))
    model = get_peft_model(base, config, adapter_name="0")
    for expert in range(1, NUM_EXPERTS):
        model.add_adapter(str(expert), config)
    layer = model.base_model.model.linear
    with torch.no_grad():
        for expert in range(NUM_EXPERTS):
            state = bank.expert_state(expert)
            layer.lora_A[str(expert)].weight.copy_(state["A"])
            layer.lora_B[str(expert)].weight.copy_(state["B"])
    return model, layer


def test_select_plus_the_base_layer_is_peft_lora_row_by_row(bank):
    model, layer = peft_model(bank)
    expert_ids = torch.tensor([2, 0, 1, 1, 2])
    x = torch.randn(5, 7, IN)
    ours = layer.base_layer(x) + bank.select(x, expert_ids)
    for row, expert in enumerate(expert_ids.tolist()):
        model.set_adapter(str(expert))
        torch.testing.assert_close(ours[row], model(x[row]))


def test_gradients_are_those_of_peft_lora(bank):
    model, layer = peft_model(bank)
    expert_ids = torch.tensor([1, 0, 1])
    x = torch.randn(3, 7, IN)
    target = torch.randn(3, 7, OUT)
    (bank.select(x, expert_ids) * target).sum().backward()
    for expert in (0, 1):
        model.set_adapter(str(expert))
        rows = expert_ids == expert
        (model(x[rows]) * target[rows]).sum().backward()
        torch.testing.assert_close(bank.A.grad[expert], layer.lora_A[str(expert)].weight.grad)
        torch.testing.assert_close(bank.B.grad[expert], layer.lora_B[str(expert)].weight.grad)


def test_delta_weight_is_the_weight_that_peft_merges(bank):
    _, layer = peft_model(bank)
    for expert in range(NUM_EXPERTS):
        torch.testing.assert_close(bank.delta_weight(expert), layer.get_delta_weight(str(expert)))


def test_a_new_bank_is_as_large_as_pefts_start():
    """Kaiming-uniform on (rank, in) for each expert, not on the stack: |A| is at most 1 / sqrt(in)."""
    torch.manual_seed(0)
    bank = LoraBank(400, 4, num_experts=5, rank=8, alpha=1.0)
    assert 0.99 / 20 < bank.A.abs().max() <= 1 / 20
    assert len({matrix.sum().item() for matrix in bank.A}) == 5


def test_gradients_pass_gradcheck(bank):
    bank = bank.double()
    x = torch.randn(3, 2, IN, dtype=torch.float64, requires_grad=True)

    def select(x, *_):
        return bank.select(x, torch.tensor([2, 0, 2]))

    assert torch.autograd.gradcheck(select, (x, bank.A, bank.B))


def test_bfloat16_inputs_give_bfloat16_outputs_and_float32_gradients_near_the_exact_ones(bank):
    expert_ids = torch.tensor([1] * 64)
    x = torch.randn(64, 8, IN).bfloat16()
    exact = LoraBank(IN, OUT, num_experts=NUM_EXPERTS, rank=RANK, alpha=ALPHA).double()
    exact.load_state_dict(bank.state_dict())
    added, expected = bank.select(x, expert_ids), exact.select(x.double(), expert_ids)
    assert added.dtype == torch.bfloat16
    torch.testing.assert_close(added.double(), expected, rtol=0.03, atol=0.1)
    added.float().square().mean().backward()
    expected.square().mean().backward()
    assert bank.A.grad.dtype == torch.float32
    torch.testing.assert_close(bank.A.grad.double(), exact.A.grad, rtol=0.03, atol=0.05)


def test_gradients_of_many_bfloat16_rows_are_summed_in_float32():
    """1024 rows with the same gradient: a sum in bfloat16 would stop growing at 256 of them."""
    bank = LoraBank(1, 1, num_experts=2, rank=1, alpha=1.0)
    nn.init.ones_(bank.B)
    x = torch.ones(1024, 1, 1, dtype=torch.bfloat16)
    bank.select(x, torch.zeros(1024, dtype=torch.long)).sum().backward()
    assert bank.A.grad[0].item() == 1024


def test_mix_with_one_expert_at_weight_1_is_peft_lora_gradients_included():
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["linear"], lora_dropout=0.0)
    base = nn.Sequential()
    base.add_module("linear", nn.Linear(IN, OUT))
    model = get_peft_model(base, config)
    layer = model.base_model.model.linear
    bank = LoraBank(IN, OUT, num_experts=1, rank=RANK, alpha=ALPHA)
    nn.init.normal_(bank.B)
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(bank.A[0])
        layer.lora_B["default"].weight.copy_(bank.B[0])
    x, target = torch.randn(3, 7, IN), torch.randn(3, 7, OUT)
    ours, theirs = layer.base_layer(x) + bank.mix(x, torch.ones(3, 7, 1)), model(x)
    torch.testing.assert_close(ours, theirs)
    ((ours - target).square().sum()).backward()
    ((theirs - target).square().sum()).backward()
    torch.testing.assert_close(bank.A.grad[0], layer.lora_A["default"].weight.grad)
    torch.testing.assert_close(bank.B.grad[0], layer.lora_B["default"].weight.grad)


@pytest.mark.parametrize("num_tokens", [1, 2 * RANK], ids=["few tokens", "many"])
def test_gradients_of_mix_pass_gradcheck(bank, num_tokens):
    bank = bank.double()
    x = torch.randn(num_tokens, IN, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(num_tokens, NUM_EXPERTS, dtype=torch.float64, requires_grad=True)

    def mix(x, weights, *_):
        return bank.mix(x, weights)

    assert torch.autograd.gradcheck(mix, (x, weights, bank.A, bank.B))


def test_the_way_for_few_tokens_equals_the_way_for_many(bank):
    x, weights = torch.randn(2 * RANK, IN), torch.rand(2 * RANK, NUM_EXPERTS)
    assert not bank.is_few(x)
    many = bank.mix(x, weights)
    few = torch.stack([bank.mix(token, shares) for token, shares in zip(x, weights, strict=True)])
    torch.testing.assert_close(few, many, rtol=1e-6, atol=1e-6)


def test_a_few_bfloat16_tokens_are_mixed_in_the_precision_of_the_experts(bank):
    """Generating then casts a token and not all experts; only what comes out is rounded."""
    x, weights = torch.randn(1, IN).bfloat16(), torch.rand(1, NUM_EXPERTS)
    assert bank.shrink(x).dtype == torch.float32
    assert torch.equal(bank.mix(x, weights), bank.mix(x.float(), weights).bfloat16())


def test_shrink_beside_is_shrink_and_a_linear_layer(bank):
    x, rows = torch.randn(5, 7, IN), torch.randn(4, IN)
    low, logits = bank.shrink_beside(x, rows)
    torch.testing.assert_close(low, bank.shrink(x))
    torch.testing.assert_close(logits, nn.functional.linear(x, rows))


@pytest.mark.parametrize("num_tokens", [1, 64])
def test_a_mixture_of_bfloat16_tokens_is_bfloat16_and_near_the_exact_one(bank, num_tokens):
    x, weights = torch.randn(num_tokens, IN).bfloat16(), torch.rand(num_tokens, NUM_EXPERTS).softmax(dim=-1)
    exact = LoraBank(IN, OUT, num_experts=NUM_EXPERTS, rank=RANK, alpha=ALPHA).double()
    exact.load_state_dict(bank.state_dict())
    added, expected = bank.mix(x, weights), exact.mix(x.double(), weights.double())
    assert added.dtype == torch.bfloat16
    torch.testing.assert_close(added.double(), expected, rtol=0.03, atol=0.1)
    added.float().square().mean().backward()
    expected.square().mean().backward()
    assert bank.A.grad.dtype == torch.float32
    torch.testing.assert_close(bank.B.grad.double(), exact.B.grad, rtol=0.03, atol=0.2)
