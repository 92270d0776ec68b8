"""Texts in, reports out: whatever order and batch size, and with every problem named."""

import json

import pytest
import torch

from data_helpers import CHATML, STRICT, assistant, byte_tokenizer, user
from prefmoe.data.render import Renderer
from prefmoe.errors import CheckpointError, DataError
from prefmoe.records import Completion, Message
from prefmoe.reward.model import DMoERMForSequenceClassification
from prefmoe.reward.score import RewardModel, score_texts
from prefmoe.reward.texts import TextTable
from prefmoe.reward.trunk import Trunk
from tiny import TASKS, tiny_backbone, tiny_reward_model

TEXTS = ["Yes.", "A much longer answer, with reasons.", "No", "🙂 مرحبا \0", "<|im_end|> is typed here"]
COMPLETIONS = [
    Completion(str(i), user(f"Question {i}?"), assistant(text), task=list(TASKS)[i % 3])
    for i, text in enumerate(TEXTS)
]


def renderer(max_length=120):
    return Renderer(byte_tokenizer(CHATML), max_length=max_length)


def network(**changes):
    marker = list(renderer().response_marker)
    model = tiny_reward_model(response_marker=marker, template_hash=renderer().template_hash, **changes)
    model.config.max_tokens = 120
    model.config.chat_template = CHATML
    return model


def reward_model(*, max_length=120, batch_tokens=8192, **changes):
    return RewardModel(network(**changes), renderer(max_length), batch_tokens=batch_tokens)


def as_rows(reports):
    return [(r.id, r.task, pytest.approx(r.reward, rel=1e-4, abs=1e-5)) for r in reports]


def test_a_report_says_the_reward_its_task_and_the_capabilities_of_that_task():
    model = reward_model()
    for report, row in zip(model.score(COMPLETIONS), COMPLETIONS, strict=True):
        encoded = model.renderer.encode(row.prompt, row.completion)
        with torch.no_grad():
            output = model.model(torch.tensor([encoded.input_ids]))
        assert report.id == row.id
        assert report.reward == pytest.approx(output.logits.item(), rel=1e-4, abs=1e-5)
        assert report.task == list(TASKS)[output.task_ids.item()]
        assert list(report.task_probs.values()) == pytest.approx(output.task_probs[0].tolist(), abs=1e-5)
        assert list(report.capabilities) == TASKS[report.task]
        assert sum(report.task_probs.values()) == pytest.approx(1)
        assert report.truncated_tokens == 0


@pytest.mark.parametrize("batch_tokens", [1, 200, 8192])
@pytest.mark.parametrize("routing", ["top1", "soft", "given"])
def test_batch_size_and_order_change_no_report(batch_tokens, routing):
    expected = reward_model().score(COMPLETIONS, routing=routing)
    turned = reward_model(batch_tokens=batch_tokens).score(COMPLETIONS[::-1], routing=routing)
    assert as_rows(turned[::-1]) == as_rows(expected)


def test_given_tasks_are_used():
    reports = reward_model().score(COMPLETIONS, routing="given")
    assert [report.task for report in reports] == [row.task for row in COMPLETIONS]


def test_one_completion_twice_gets_the_same_reward():
    first, second = reward_model().score([COMPLETIONS[0]] * 2)
    assert first == second


def test_nothing_to_score():
    assert reward_model().score([]) == []


def test_lost_tokens_are_reported():
    long = Completion("long", user("x" * 500), assistant("y"))
    assert reward_model().score([long])[0].truncated_tokens > 400


def test_all_completions_that_cannot_be_scored_are_named():
    rows = [
        COMPLETIONS[0],
        Completion("e", user("?"), assistant("")),
        Completion("f", user("?"), assistant(" \n")),
    ]
    with pytest.raises(DataError, match=r"completion 'e': the completion is empty.*\ncompletion 'f': "):
        reward_model().score(rows)


@pytest.mark.parametrize("task", [None, "poetry"])
def test_a_given_task_that_the_model_does_not_know(task):
    row = Completion("1", user("?"), assistant("!"), task=task)
    with pytest.raises(
        DataError, match=rf"tasks \['{task}'\] are not among those of the model.*use top1 routing"
    ):
        reward_model().score([row], routing="given")


def test_progress_reaches_its_total():
    seen = []

    class Bar:
        def __init__(self, label, total):
            seen.append(total)

        def __enter__(self):
            return lambda amount: seen.append(amount)

        def __exit__(self, *_):
            return None

    reward_model(batch_tokens=100).score(COMPLETIONS, progress=Bar)
    assert sum(seen[1:]) == seen[0] > 0
    assert len(seen) > 2


def test_scores_with_cached_trunk_states_are_those_without(tmp_path):
    """Defect 8 of the release: what is frozen is computed once, and the reward is the same."""
    model, table = network(), TextTable()
    texts = [table.add(renderer().encode(row.prompt, row.completion)) for row in COMPLETIONS]
    cached = Trunk(model.backbone, 2, table, folder=tmp_path)
    cached.prepare(texts)
    live = Trunk(model.backbone, 2, table)
    for left, right in zip(score_texts(model, cached, texts), score_texts(model, live, texts), strict=True):
        assert torch.equal(left.nan_to_num(7.0), right.nan_to_num(7.0))


# --- loading -----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    network().save_pretrained(tmp_path, include_backbone=True)
    byte_tokenizer(CHATML).save_pretrained(tmp_path)
    return tmp_path


def test_a_saved_model_gives_the_same_reports(folder):
    assert RewardModel.load(folder).score(COMPLETIONS) == reward_model().score(COMPLETIONS)


@pytest.mark.parametrize("dense", [False, True], ids=["LoRA", "full deltas"])
def test_experts_stored_as_they_compute_give_the_same_reports_bit_for_bit(tmp_path, dense):
    model = network(dense_tasks=dense)
    model.backbone.to(torch.bfloat16)
    model.save_pretrained(tmp_path, include_backbone=True)
    byte_tokenizer(CHATML).save_pretrained(tmp_path)
    kept = DMoERMForSequenceClassification.from_pretrained(tmp_path)
    loaded = RewardModel.load(tmp_path)
    banks = [*loaded.model.experts.sites.parameters(), *loaded.model.experts.dense.parameters()]
    assert {p.dtype for p in banks} == {torch.bfloat16}
    assert {p.dtype for p in kept.experts.parameters()} == {torch.float32}
    assert loaded.model.experts.head_weight.dtype == torch.float32
    assert loaded.score(COMPLETIONS) == RewardModel(kept, renderer()).score(COMPLETIONS)
    assert len({report.reward for report in loaded.score(COMPLETIONS)}) == len(COMPLETIONS)


def test_another_chat_template_is_refused():
    other = Renderer(byte_tokenizer(STRICT), max_length=120)
    with pytest.raises(CheckpointError, match=f"hash {other.template_hash}.*hash {renderer().template_hash}"):
        RewardModel(network(), other)


def test_a_tokenizer_whose_template_was_changed_is_overruled_by_the_saved_template(folder):
    byte_tokenizer(STRICT).save_pretrained(folder)
    assert RewardModel.load(folder).renderer.chat_template == CHATML


def test_a_tokenizer_with_other_words_is_refused(folder):
    """The template is the saved one, so only what it makes of a text can tell."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    words = content["model"]["vocab"]
    words["a"], words["e"] = words["e"], words["a"]
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(CheckpointError, match="the chat template or the tokenizer .* is not the one"):
        RewardModel.load(folder)


def test_no_tokenizer_beside_the_model(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(
        CheckpointError, match="holds no tokenizer that can be read; copy it from the training run"
    ):
        RewardModel.load(folder)


@pytest.mark.parametrize("max_length", [40, 120])
def test_context_before_the_last_turn_counts(max_length):
    """Defect 17 of the release: the reward read only the last user turn."""
    turns = {
        name: (Message("user", first), Message("assistant", "OK."), Message("user", "And now?"))
        for name, first in {"a": "Be kind.", "b": "Be rude."}.items()
    }
    first, second = reward_model(max_length=max_length, pooling="mean").score(
        [Completion(name, prompt, assistant("Sure.")) for name, prompt in turns.items()], routing="soft"
    )
    assert (first.reward == second.reward) is (
        max_length == 40
    )  # unless it does not fit, and then it is reported
    assert (first.truncated_tokens > 0) is (max_length == 40)


def test_a_backbone_of_another_family_scores_too():
    backbone = tiny_backbone("gemma")
    assert len(RewardModel(network(backbone=backbone), renderer()).score(COMPLETIONS)) == len(COMPLETIONS)
