"""Prompts that a pair shares are run once: the losses, gradients and records of the plain pass, and fewer tokens."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from trl import DPOConfig, DPOTrainer
from trl.kernels import ChunkedLogProbFunction

from data_helpers import CHATML, byte_tokenizer
from prefmoe import connect_preferences, share_prompts
from prefmoe.backbone.layers import TESTED_FAMILIES
from prefmoe.policy.inspect import inspect_routing
from prefmoe.policy.logps import completion_logps
from prefmoe.policy.pairs import Text
from prefmoe.policy.shared_prompts import can_share, has_plain_head
from tiny_policy import CONFIGS, pmol_config, randomize, tiny_lm, tiny_policy, tokens

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

PAIRS = [
    {"prompt": "a long question " * 3, "chosen": "yes, and why", "rejected": "no", "preference": "a"},
    {"prompt": "a long quest", "chosen": "ye", "rejected": "yes, but not so", "preference": "b"},
    {
        "prompt": "q",
        "chosen": "the same start, then a",
        "rejected": "the same start, then b",
        "preference": None,
    },
]


def trainer_of(out, adapter, *, family="llama", checkpointing=False, shared=True, **options):
    tokenizer = byte_tokenizer(CHATML)
    tokenizer.pad_token = "</s>"
    torch.manual_seed(0)
    reference = None
    if (
        adapter is None
    ):  # all weights are trained; the reference is a model of its own, here quite another one
        reference = tiny_lm(family)
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter.mul_(1.5)
    trainer = DPOTrainer(
        model=tiny_lm(family),
        ref_model=reference,
        args=DPOConfig(
            output_dir=str(out),
            per_device_train_batch_size=len(PAIRS),
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            max_length=None,
            **options,
        ),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer,
        peft_config=adapter,
    )
    randomize(trainer.model)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    if adapter is not None and not isinstance(adapter, LoraConfig):
        connect_preferences(trainer)
    return share_prompts(trainer) if shared else trainer


def step(trainer):
    """Loss, gradients and what was logged of one batch, and how many tokens the first layer saw."""
    model = trainer.accelerator.unwrap_model(trainer.model).train()
    if trainer.args.gradient_checkpointing:  # as `train()` does
        model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    seen = []
    layer = next(m for n, m in model.named_modules() if n.endswith("layers.0.mlp") or n.endswith("h.0.mlp"))
    hook = layer.register_forward_hook(
        lambda _, args, __: seen.append(args[0].shape[:-1].numel()) if torch.is_grad_enabled() else None
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(PAIRS))])
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    hook.remove()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    logs = {}
    for name, values in trainer._metrics["train"].items():
        logs[name] = sum(values) / len(values)
    return loss.detach(), gradients, logs, seen[0]


def assert_same_step(got, expected):
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-6)
    assert got[1].keys() == expected[1].keys()
    assert any(gradient.abs().max() > 1e-4 for gradient in got[1].values())
    for name, gradient in got[1].items():
        error = (gradient - expected[1][name]).abs().max() / expected[1][name].abs().max().clamp_min(1e-6)
        assert error < 1e-3, f"{name}: {error:.1e} of its largest"
    assert got[2] == pytest.approx(expected[2], rel=1e-4, abs=1e-5)


LORA = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
ADAPTERS = {"none": None, "lora": LORA} | {name: pmol_config(**changes) for name, changes in CONFIGS.items()}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_step_is_that_of_the_plain_trainer_on_fewer_tokens(adapter, tmp_path):
    plain, shared = (
        step(trainer_of(tmp_path, copy.deepcopy(ADAPTERS[adapter]), shared=shared))
        for shared in (False, True)
    )
    assert_same_step(shared, plain)
    assert shared[3] < 0.6 * plain[3]


@pytest.mark.parametrize("family", sorted(set(TESTED_FAMILIES) - {"llama"}))
def test_a_step_of_every_family(family, tmp_path):
    plain, shared = (
        step(trainer_of(tmp_path, pmol_config(), family=family, shared=shared)) for shared in (False, True)
    )
    assert_same_step(shared, plain)
    assert shared[3] < plain[3]


def test_a_model_of_another_family_runs_as_it_always_did(tmp_path):
    plain, shared = (
        step(trainer_of(tmp_path, pmol_config(), family="gpt2", shared=shared)) for shared in (False, True)
    )
    assert_same_step(shared, plain)
    assert shared[3] == plain[3]


@pytest.mark.parametrize(
    ("adapter", "options", "asked"),
    [(pmol_config(), {}, 0), (LORA, {}, 0), (None, {}, 1), (pmol_config(), {"use_weighting": True}, 1)],
    ids=["pmol", "lora", "a head that learns", "wpo"],
)
def test_trls_head_is_asked_only_where_ours_cannot_stand_in(adapter, options, asked, tmp_path, monkeypatch):
    calls = []
    plain = ChunkedLogProbFunction.apply
    monkeypatch.setattr(ChunkedLogProbFunction, "apply", lambda *rest: calls.append(1) or plain(*rest))
    trainer = trainer_of(tmp_path, copy.deepcopy(adapter), **options)
    model = trainer.accelerator.unwrap_model(trainer.model)
    batch = trainer.data_collator(list(trainer.train_dataset))
    labels = batch["input_ids"].where(batch["completion_mask"].bool(), -100)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    model(**inputs, labels=labels, fused_lm_head=True)
    assert len(calls) == asked


def test_the_weights_of_wpo_are_those_of_the_plain_trainer(tmp_path):
    plain, shared = (
        step(trainer_of(tmp_path, pmol_config(), shared=shared, use_weighting=True))
        for shared in (False, True)
    )
    assert_same_step(shared, plain)
    unweighted = step(trainer_of(tmp_path, pmol_config()))
    assert abs(unweighted[0] - plain[0]) > 1e-3


@pytest.mark.parametrize("adapter", ["lora", "default", "linear scope", "model scope", "recurrent"])
def test_gradient_checkpointing_changes_nothing(adapter, tmp_path):
    plain, shared = (
        step(trainer_of(tmp_path, copy.deepcopy(ADAPTERS[adapter]), checkpointing=True, shared=shared))
        for shared in (False, True)
    )
    assert_same_step(shared, plain)
    assert shared[3] < 0.6 * plain[3]


def test_a_reference_pass_between_forward_and_backward_changes_nothing(tmp_path):
    """TRL runs it on the same texts; here it runs on others, as other trainers may, and blocks are computed again."""
    trainer = trainer_of(tmp_path, pmol_config(), checkpointing=True)
    expected = step(trainer)[1]
    model = trainer.model
    model.zero_grad()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(PAIRS))])
    loss = trainer.compute_loss(model, batch)
    with torch.no_grad(), model.disable_adapter():
        completion_logps(model, some_texts())
        model.train()
    loss.backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], msg=name)


def test_the_log_has_the_routers_statistics_of_texts_and_not_of_nodes(tmp_path):
    logs = []
    for shared in (False, True):
        trainer = trainer_of(tmp_path, pmol_config(), shared=shared)
        heard = {}
        routing = trainer.model.base_model.routings["default"]
        routing.listeners.append(lambda records, batch, heard=heard: heard.update(records=list(records)))
        step(trainer)
        logs.append(heard["records"])
    for plain, shared in zip(*logs, strict=True):
        assert shared.router == plain.router
        for got, expected in zip(shared[1:], plain[1:], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def some_texts() -> list[Text]:
    prompts = [tuple(tokens(1, n, seed=n)[0].tolist()) for n in (2, 9, 30)]
    answers = [tuple(tokens(1, n, seed=50 + n)[0].tolist()) for n in (1, 4, 11)]
    return [Text(prompt, answer) for answer in answers for prompt in prompts] + [Text(prompts[0], answers[0])]


@pytest.mark.parametrize("family", [*TESTED_FAMILIES, "gpt2"])
@pytest.mark.parametrize("batch_tokens", [1, 50, 10_000])
def test_log_probabilities_are_those_of_texts_alone(family, batch_tokens):
    model = tiny_policy(tiny_lm(family))
    texts = some_texts()
    expected = []
    for text in texts:
        ids = torch.tensor([text.prompt_ids + text.completion_ids])
        with torch.no_grad():
            logps = model(input_ids=ids).logits[0, :-1].log_softmax(dim=-1)
        of_tokens = logps.gather(1, ids[0, 1:, None])[:, 0]
        expected.append(of_tokens[len(text.prompt_ids) - 1 :].sum())
    found = completion_logps(model, texts, batch_tokens=batch_tokens)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head", ["plain", "with a bias", "with LoRA"])
def test_a_head_of_its_own_kind_has_its_say(head):
    model = tiny_lm()
    if head == "with a bias":
        model.lm_head = nn.Linear(*reversed(model.lm_head.weight.shape))
        nn.init.normal_(model.lm_head.bias)
    elif head == "with LoRA":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    model.eval()
    assert has_plain_head(model) == (head == "plain")
    text = Text((5, 6, 7), (8, 9))
    with torch.no_grad():
        logps = model(input_ids=torch.tensor([[5, 6, 7, 8, 9]])).logits[0, 2:4].log_softmax(dim=-1)
    expected = logps[0, 8] + logps[1, 9]
    torch.testing.assert_close(completion_logps(model, [text])[0], expected, rtol=1e-4, atol=1e-4)


def test_routing_is_recorded_by_text(monkeypatch):
    model, texts = tiny_policy(), some_texts()
    names = ["a", "b"] * 5
    shared = inspect_routing(model, texts, names)
    monkeypatch.setattr("prefmoe.policy.logps.can_share", lambda *_, **__: False)
    plain = inspect_routing(model, texts, names)
    torch.testing.assert_close(shared.logps, plain.logps, rtol=1e-4, atol=1e-4)
    assert torch.equal(shared.hits, plain.hits)
    for name in ("a", "b"):
        torch.testing.assert_close(
            torch.tensor(shared.table.weights[name]),
            torch.tensor(plain.table.weights[name]),
            rtol=1e-4,
            atol=1e-5,
        )


def test_texts_that_are_steered_each_on_its_own_share_nothing():
    model = tiny_policy()
    assert can_share(model, longest=50)
    with model.base_model.steered([{"a": 2.0}, {"b": 2.0}]):
        assert not can_share(model, longest=50)
    with model.base_model.steered({"a": 2.0}):
        assert can_share(model, longest=50)


def test_a_window_shorter_than_the_texts_shares_nothing():
    model = tiny_lm("mistral")
    model.config.sliding_window = 16
    assert can_share(model, longest=16)
    assert not can_share(model, longest=17)


def test_the_model_is_its_old_self_afterwards():
    model = tiny_policy()
    ids = tokens(2, 7)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        completion_logps(model, some_texts())
        assert torch.equal(model(input_ids=ids).logits, before)
    assert all(
        "forward" not in vars(module) for module in model.modules() if not isinstance(module, nn.Linear)
    )


def test_dropout_in_attention_is_not_lost():
    model = get_peft_model(tiny_lm(), pmol_config()).train()
    assert can_share(model, longest=50)
    model.config.attention_dropout = 0.1
    assert not can_share(model, longest=50)
    assert can_share(model.eval(), longest=50)
