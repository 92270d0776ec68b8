"""Sampled answers under a judge: what is counted, and what an adapter that changes nothing must get."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from data_helpers import CHATML, byte_tokenizer, write_rows
from prefmoe.errors import CheckpointError, ConfigError, DataError
from prefmoe.policy import judged
from prefmoe.policy.judged import RESULT, Judgement, JudgeSettings, judge_policies
from prefmoe.policy.methods import num_trainable
from prefmoe.policy.sampling import sample_answers
from tiny import tiny_language_model
from tiny_policy import pmol_config, randomize

pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file", "ignore::DeprecationWarning")
OPTIONS = {"prompts_per_preference": 5, "max_new_tokens": 6, "temperature": 1.0, "seed": 0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A language model; an untrained LoRA, which changes nothing; a PMoL adapter whose experts are random."""
    root = tmp_path_factory.mktemp("policies")
    tiny_language_model().save_pretrained(root / "model")
    byte_tokenizer(CHATML).save_pretrained(root / "model")
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    for name, config in (("lora", lora), ("pmol", pmol_config())):
        model = tiny_language_model().from_pretrained(root / "model")
        adapted = get_peft_model(model, config)
        randomize(adapted)
        assert num_trainable(adapted)
        adapted.save_pretrained(root / name)
    rows = [
        {"prompt": f"{name} {i % 7}?", "chosen": "yes", "rejected": "no", "preference": name}
        for i in range(9)
        for name in ("a", "b", "unknown")
    ]
    write_rows(root / "pairs.jsonl", rows)
    return root


def judge(completions):
    """Longer is better; and it must never see an answer without text."""
    assert all(row.completion[0].content.strip() for row in completions)
    return [len(row.completion[0].content) + 100.0 * (row.task == "b") for row in completions]


@pytest.fixture
def run(folders, tmp_path_factory):
    def judge_in(*names, out=None, pairs=folders / "pairs.jsonl", **changes):
        settings = JudgeSettings(
            policies=[str(folders / name) for name in names],
            reward_model="unused",
            prompts_of=[str(pairs)],
            out=str(out or tmp_path_factory.mktemp("judged")),
            **OPTIONS | changes,
        )
        return judge_policies(settings, judge, tasks=["a", "b"])

    return judge_in


def test_an_adapter_that_changes_nothing_ties_with_the_base(run):
    found = run("lora", "pmol")
    for row in found.answers:
        assert row.answers["lora"] == row.answers["base"]
    for name in ("a", "b"):
        assert found.policies["lora"][name].wins.value == 0.5
        assert found.policies["lora"][name].reward == found.policies["base"][name].reward
    assert any(row.answers["pmol"] != row.answers["base"] for row in found.answers)


def test_a_policy_is_steered_before_it_answers(run):
    trained, turned_off = run("pmol"), run("pmol", prefer={"a": 0.0, "b": 0.0})
    assert all(row.answers["pmol"] == row.answers["base"] for row in turned_off.answers)
    assert any(row.answers["pmol"] != row.answers["base"] for row in trained.answers)


def test_the_numbers_are_those_of_the_answers_beside_them(run):
    found = run("pmol")
    for name in ("a", "b"):
        rows = [row for row in found.answers if row.preference == name]
        assert len({row.prompt for row in rows}) == len(rows) == 5
        rewards = [row.rewards["pmol"] for row in rows]
        expected = [len(row.answers["pmol"]) + 100.0 * (name == "b") for row in rows]
        assert [r for r in rewards if r is not None] == [
            e for e, row in zip(expected, rows, strict=True) if row.answers["pmol"].strip()
        ]
        told = [r for r in rewards if r is not None]
        judged_answers = found.policies["pmol"][name]
        assert judged_answers.reward.value == pytest.approx(sum(told) / len(told))
        assert judged_answers.reward.low <= judged_answers.reward.value <= judged_answers.reward.high
        assert judged_answers.empty == rewards.count(None)
    assert {row.preference for row in found.answers} == {"a", "b"}


def test_an_answer_without_text_loses_to_any_other_and_has_no_reward(run, monkeypatch):
    def answers(model, tokenizer, prompts, *, label, **_):
        is_base = "without adapter" in label
        return ["x", " ", "x", "", "xx"] * 2 if is_base else ["", "x", "xx", "\n", "x"] * 2

    monkeypatch.setattr(judged, "sample_answers", answers)
    found = run("pmol").policies["pmol"]["a"]
    # Loses, wins, wins, ties, loses.
    assert found.wins.value == pytest.approx(0.5)
    assert (found.empty, found.prompts) == (2, 5)
    assert found.reward.value == pytest.approx(4 / 3)


def test_no_text_at_all_has_no_reward(run, monkeypatch):
    monkeypatch.setattr(judged, "sample_answers", lambda *_, **__: [""] * 10)
    found = run("pmol").policies["pmol"]["b"]
    assert found.reward is None
    assert (found.wins.value, found.empty) == (0.5, 5)


def test_steering_changes_answers_and_plain_adapters_refuse_it(run):
    plain, steered = run("pmol"), run("pmol", prefer={"a": 50.0, "b": 0.0})
    assert [row.answers["base"] for row in plain.answers] == [row.answers["base"] for row in steered.answers]
    assert [row.answers["pmol"] for row in plain.answers] != [row.answers["pmol"] for row in steered.answers]
    with pytest.raises(ConfigError, match="lora: is no PMoL adapter, it cannot be steered"):
        run("lora", prefer={"a": 2.0})


def test_a_stopped_run_goes_on_with_the_policy_whose_answers_are_missing(run, tmp_path, monkeypatch):
    whole = run("lora", "pmol", out=tmp_path / "whole")
    assert Judgement.model_validate_json((tmp_path / "whole" / RESULT).read_bytes()) == whole
    real, asked = judged.sample_answers, []

    def stops_at_pmol(*args, label, **options):
        asked.append(label)
        if asked == ["answers of the model without adapter", "answers of lora", "answers of pmol"]:
            raise KeyboardInterrupt
        return real(*args, label=label, **options)

    monkeypatch.setattr(judged, "sample_answers", stops_at_pmol)
    with pytest.raises(KeyboardInterrupt):
        run("lora", "pmol", out=tmp_path / "parts")
    assert run("lora", "pmol", out=tmp_path / "parts") == whole
    assert asked[3:] == ["answers of pmol"]
    with pytest.raises(ConfigError, match="parts holds a run with another config"):
        run("lora", "pmol", out=tmp_path / "parts", seed=1)


def test_an_adapter_that_was_trained_anew_is_not_mixed_with_the_answers_of_the_old_one(
    run, folders, tmp_path
):
    run("pmol", out=tmp_path / "run")
    kept = (folders / "pmol" / "adapter_model.safetensors").read_bytes()
    try:
        (folders / "pmol" / "adapter_model.safetensors").write_bytes(
            (folders / "lora" / "adapter_model.safetensors").read_bytes()
        )
        with pytest.raises(DataError, match="policy pmol changed since this run began"):
            run("pmol", out=tmp_path / "run")
    finally:
        (folders / "pmol" / "adapter_model.safetensors").write_bytes(kept)


@pytest.mark.parametrize("wrong", [("lora", {"a": 2.0}), ("pmol", {"c": 2.0}), ("nothing", {})])
def test_what_is_refused_leaves_no_run_folder_in_the_way(run, tmp_path, wrong):
    name, weights = wrong
    with pytest.raises((ConfigError, CheckpointError)):
        run(name, prefer=weights, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    run("lora", out=tmp_path / "run")


def test_two_policies_of_one_name(run):
    with pytest.raises(
        ConfigError, match="policies need different names, none of them 'base'; got pmol, pmol"
    ):
        run("pmol", "pmol")


def test_preferences_that_the_judge_does_not_know(run, tmp_path):
    write_rows(tmp_path / "c.jsonl", [{"prompt": "q", "chosen": "y", "rejected": "n", "preference": "c"}])
    with pytest.raises(ConfigError, match="knows none of the preferences c; its tasks are a, b"):
        run("pmol", pairs=tmp_path / "c.jsonl")
    write_rows(tmp_path / "d.jsonl", [{"prompt": "q", "chosen": "y", "rejected": "n"}])
    with pytest.raises(DataError, match="no row has a 'preference'"):
        run("pmol", pairs=tmp_path / "d.jsonl")


@pytest.mark.parametrize("batch_rows", [1, 2, 16])
def test_greedy_answers_are_those_of_prompts_alone(batch_rows):
    model, tokenizer = tiny_language_model(), byte_tokenizer(CHATML)
    prompts = [
        torch.randint(3, 300, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (9, 3, 14)
    ]
    options = {"max_new_tokens": 5, "temperature": 0.0, "seed": 0}
    found = sample_answers(model, tokenizer, prompts, batch_rows=batch_rows, **options)
    for prompt, answer in zip(prompts, found, strict=True):
        ids = list(prompt)
        for _ in range(5):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        assert answer == tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


def test_the_seed_decides_the_answers():
    model, tokenizer = tiny_language_model(), byte_tokenizer(CHATML)
    options = {"max_new_tokens": 8, "temperature": 1.0}
    first, again, other = (
        sample_answers(model, tokenizer, [[5, 6, 7]], seed=seed, **options) for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other
