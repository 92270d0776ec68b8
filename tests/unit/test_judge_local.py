"""The offline judge: probabilities of the allowed answers, the same alone, in a batch, and on shared texts."""

import math

import pytest
import torch
from transformers import LlamaForCausalLM

from data_helpers import CHATML, byte_tokenizer
from judge_helpers import interview, pair
from prefmoe.errors import ConfigError
from prefmoe.labeling.judge.local import LocalJudge, version_of
from prefmoe.labeling.judge.wording import Wording
from tiny import tiny_backbone


def tiny_model(max_positions=4096):
    config = tiny_backbone().config
    config.max_position_embeddings = max_positions
    config.vocab_size = 300
    torch.manual_seed(1)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():  # far from uniform, so that a wrong mask or position shows
        for parameter in model.parameters():
            parameter.mul_(4.0)
    return model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def asked(judge, questions):
    calls = {}
    batches = []

    def record(batch):
        batches.append(len(batch))
        calls.update({(c.question.pair_id, c.question.points[0], c.question.swapped): c for c in batch})

    judge.ask(questions, record)
    return calls, batches


def all_questions(num=5, **options):
    changes = {"wording": Wording(max_characters=40), **options}
    return [
        q
        for i in range(num)
        for q in interview(**changes).questions(
            pair(f"p{i}", chosen="yes " * (1 + 3 * i % 7), rejected="no, " * (i + 1))
        )
    ]


def slow(model, tokenizer, question):
    """One question on its own: no batch, no cache."""
    messages = [{"role": "system", "content": question.system}, {"role": "user", "content": question.user}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(text, add_special_tokens=False)
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, -1].float()
    answers = [tokenizer.encode(answer, add_special_tokens=False)[0] for answer in question.allowed]
    return logits[answers].softmax(-1).tolist()


@pytest.mark.parametrize("batch_tokens", [1, 10_000])
def test_batches_and_shared_beginnings_change_no_probability(model, batch_tokens):
    tokenizer = byte_tokenizer(CHATML)
    questions = all_questions()
    calls, _ = asked(LocalJudge(model, tokenizer, batch_tokens=batch_tokens), questions)
    assert len(calls) == len(questions) == 20
    spread = set()
    for question in questions:
        answer = calls[question.pair_id, question.points[0], question.swapped].answers[question.points[0]]
        expected = slow(model, tokenizer, question)
        assert answer.probabilities == pytest.approx(expected, abs=1e-4)
        assert answer.choice == question.allowed[expected.index(max(expected))]
        spread.add(round(expected[0], 3))
    assert len(spread) > 5, "the questions are not told apart, so the test would not see a mistake"


def test_points_may_differ_between_pairs(model):
    """A pair with fewer points left than its neighbors in the batch."""
    tokenizer = byte_tokenizer(CHATML)
    questions = [*all_questions(2), *interview().questions(pair("x", capabilities={"wit": 1}))]
    calls, _ = asked(LocalJudge(model, tokenizer), questions)
    lonely = questions[-1]
    assert calls["x", "brevity", True].answers["brevity"].probabilities == pytest.approx(
        slow(model, tokenizer, lonely), abs=1e-4
    )


def test_answers_come_batch_by_batch(model):
    _, batches = asked(LocalJudge(model, byte_tokenizer(CHATML), batch_tokens=1), all_questions())
    assert batches == [2] * 10


def test_without_ties_there_are_two_answers(model):
    questions = all_questions(1, wording=Wording(ties=False))
    calls, _ = asked(LocalJudge(model, byte_tokenizer(CHATML)), questions)
    for call in calls.values():
        (answer,) = call.answers.values()
        assert answer.choice in ("1", "2")
        assert answer.probabilities[2] == 0
        assert math.fsum(answer.probabilities) == pytest.approx(1)


def test_a_question_that_does_not_fit_is_unusable():
    model = tiny_model(max_positions=900)
    long = pair("long", chosen="x" * 2000)
    questions = [*interview().questions(long), *interview().questions(pair("short"))]
    calls, _ = asked(LocalJudge(model, byte_tokenizer(CHATML)), questions)
    assert {key[0]: call.answers[key[1]].reason for key, call in calls.items()} == {
        "long": "too long",
        "short": None,
    }


def test_a_tokenizer_without_a_chat_template_is_given_plain_text(model):
    calls, _ = asked(LocalJudge(model, byte_tokenizer()), all_questions(1))
    assert len(calls) == 4


def test_a_tokenizer_that_merges_answers_with_what_stands_before_is_refused(model):
    merged = byte_tokenizer(merges=[("Ċ", "1")])
    with pytest.raises(
        ConfigError, match="does not tell the answers .* apart by one token; choose another model"
    ):
        asked(LocalJudge(model, merged), all_questions(1))


def test_a_saved_model_is_loaded_by_its_folder(model, tmp_path):
    model.save_pretrained(tmp_path)
    byte_tokenizer(CHATML).save_pretrained(tmp_path)
    calls, _ = asked(LocalJudge.load(str(tmp_path)), all_questions(1))
    expected, _ = asked(LocalJudge(model, byte_tokenizer(CHATML)), all_questions(1))
    for key, call in calls.items():
        assert call.answers[key[1]].probabilities == pytest.approx(
            expected[key].answers[key[1]].probabilities, abs=1e-3
        )


def test_in_bfloat16_only_the_body_is_rounded(model, tmp_path):
    model.save_pretrained(tmp_path)
    byte_tokenizer(CHATML).save_pretrained(tmp_path)
    judge = LocalJudge.load(str(tmp_path), dtype=torch.bfloat16)
    body, head = judge._model.get_input_embeddings(), judge._model.get_output_embeddings()
    assert (body.weight.dtype, head.weight.dtype) == (torch.bfloat16, torch.float32)
    with torch.inference_mode():
        logits = judge._model(torch.tensor([[1, 2, 3]])).logits
    assert logits.dtype == torch.float32
    assert (logits != logits.bfloat16()).any(), "the logits were rounded"
    calls, _ = asked(judge, all_questions(1))
    expected, _ = asked(LocalJudge.load(str(tmp_path)), all_questions(1))
    for key, call in calls.items():
        rounded = call.answers[key[1]].probabilities
        assert rounded != expected[key].answers[key[1]].probabilities
        assert rounded == pytest.approx(expected[key].answers[key[1]].probabilities, abs=0.2)


def test_a_name_that_leads_nowhere_and_a_body_without_a_head(tmp_path):
    with pytest.raises(ConfigError, match="local judge './nowhere' cannot be loaded"):
        LocalJudge.load("./nowhere")
    with pytest.raises(ConfigError, match=r"'none.gguf' cannot be loaded: there is no such file"):
        LocalJudge.load("none.gguf")
    tiny_backbone().save_pretrained(tmp_path)
    byte_tokenizer(CHATML).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"lacks 1 tensors: \['lm_head.weight'\]; is it a language model"):
        LocalJudge.load(str(tmp_path))


def test_the_version_of_a_model_from_a_hub_is_its_commit(tmp_path, monkeypatch):
    commit = "0123456789abcdef" * 2
    snapshot = tmp_path / "models--some--judge" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--some--judge" / "refs").mkdir()
    (tmp_path / "models--some--judge" / "refs" / "main").write_text(commit)
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert version_of("some/judge") == "01234567"
