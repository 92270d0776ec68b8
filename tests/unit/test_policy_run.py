"""The parts of a policy run: pairs, log-probabilities, implicit rewards, sizes of methods, export."""

import pytest
import torch
from peft import PeftModel, get_peft_model

from data_helpers import CHATML, assistant, byte_tokenizer, user, write_rows
from prefmoe.data.render import Renderer
from prefmoe.errors import ConfigError, DataError
from prefmoe.nn import LoraBank
from prefmoe.policy.config import PMoLConfig
from prefmoe.policy.evaluate import implicit_margins
from prefmoe.policy.export import export_lora, mean_weights
from prefmoe.policy.inspect import inspect_routing
from prefmoe.policy.logps import completion_logps
from prefmoe.policy.methods import lora_config, num_trainable, pmol_config, rank_of_lora
from prefmoe.policy.pairs import Text, encode, read_splits
from prefmoe.policy.settings import AdapterSettings, DataSettings, TrainingSettings
from prefmoe.records import PreferencePair
from tiny import tiny_language_model

GROUPS = {"helpful": 2, "harmless": 1}


def policy(*, is_blind: bool = False, **changes):
    """A PMoL adapter whose experts do something; with `is_blind` its routers find all choices alike."""
    model = get_peft_model(
        tiny_language_model(), PMoLConfig(groups=GROUPS, rank=2, task_type="CAUSAL_LM", **changes)
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoraBank):
                module.B.normal_(std=0.2)
        for name, parameter in model.named_parameters():
            if "pmol_router" in name:
                parameter.zero_() if is_blind else parameter.normal_(std=0.5)
    return model.eval()


def texts(num: int = 7) -> list[Text]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for index in range(num):
        ids = torch.randint(3, 300, (4 + 3 * index,), generator=generator).tolist()
        made.append(Text(tuple(ids[: 2 + index]), tuple(ids[2 + index :])))
    return made


def plain_logp(model, text: Text) -> float:
    """One text alone, without padding, token by token."""
    ids = torch.tensor([text.prompt_ids + text.completion_ids])
    with torch.no_grad():
        logps = model(input_ids=ids).logits[0].double().log_softmax(dim=-1)
    start = len(text.prompt_ids)
    return sum(logps[start + i - 1, token].item() for i, token in enumerate(text.completion_ids))


@pytest.mark.parametrize("make", [tiny_language_model, policy], ids=["model", "adapter"])
@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_log_probabilities_are_those_of_every_text_alone(make, batch_tokens):
    model = make()
    found = completion_logps(model, texts(), batch_tokens=batch_tokens)
    expected = torch.tensor([plain_logp(model, text) for text in texts()])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_margins_of_implicit_rewards_by_hand():
    logps = torch.tensor([-10.0, -20.0, -12.0, -15.0])
    reference = torch.tensor([-11.0, -20.0, -11.0, -17.0])
    margins = implicit_margins(logps, reference, beta=0.1)
    torch.testing.assert_close(margins, torch.tensor([0.1 * (1.0 + 1.0), 0.1 * (0.0 - 2.0)]))


def test_routing_is_measured_on_completions_only_and_does_not_change_log_probabilities():
    model = policy()
    names = ["helpful", "harmless", "helpful", "other", "harmless", "helpful", "harmless"]
    found = inspect_routing(model, texts(), names, batch_tokens=60)
    torch.testing.assert_close(found.logps, completion_logps(model, texts(), batch_tokens=60))
    assert found.table.groups == ["helpful", "harmless", "empty"]
    assert len(found.table.routers) == 2  # one a block
    for rows in found.table.weights.values():
        torch.testing.assert_close(torch.tensor(rows).sum(dim=1), torch.ones(2))
    alone = [inspect_routing(model, [text], [name]) for text, name in zip(texts(), names, strict=True)]
    assert torch.equal(found.hits, torch.cat([one.hits for one in alone]))
    # Other tokens in front of the same completion mask: weights are read at the completion's places.
    text = texts()[3]
    longer = Text((5, 6, *text.prompt_ids), text.completion_ids)
    assert (
        inspect_routing(model, [longer], ["helpful"]).table.weights
        != inspect_routing(model, [text], ["helpful"]).table.weights
    )
    assert found.hits[3] == 0  # a preference without a group is nobody's own


def test_both_sides_of_a_pair_follow_the_same_prompt():
    renderer = Renderer(byte_tokenizer(CHATML), max_length=90)
    pair = PreferencePair("p", user("word " * 20), assistant("a" * 40), assistant("b"), task="helpful")
    found = encode([pair], renderer, allow_equal=False)
    row = found.rows[0]
    longest = renderer.encode(pair.prompt, pair.chosen)
    assert found.num_truncated == 1
    assert row.prompt_ids == longest.input_ids[: longest.prompt_length]
    assert len(row.prompt_ids) + len(row.chosen_ids) <= 90
    assert renderer.tokenizer.decode(row.rejected_ids).startswith("b")


def test_training_pairs_that_became_equal_are_named_and_test_pairs_are_kept():
    renderer = Renderer(byte_tokenizer(CHATML), max_length=40)
    pair = PreferencePair("p7", user("x"), assistant("a" * 60), assistant("a" * 70), preference="helpful")
    with pytest.raises(
        DataError, match="1 training pairs have equal sides once they are cut to 40 tokens: p7"
    ):
        encode([pair], renderer, allow_equal=False)
    assert len(encode([pair], renderer, allow_equal=True).rows) == 1


def rows(**columns):
    return [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} | columns for i in range(3)]


def test_a_preference_that_the_data_do_not_have_is_named_with_the_nearest(tmp_path):
    write_rows(tmp_path / "a.jsonl", rows(task="helpful"))
    settings = DataSettings(train=str(tmp_path / "a.jsonl"), preferences=["helpfull"])
    with pytest.raises(
        DataError, match="no pair of preference 'helpfull'; there are helpful; did you mean 'helpful'"
    ):
        read_splits(settings, seed=0)


def test_data_without_preferences_are_refused(tmp_path):
    write_rows(tmp_path / "a.jsonl", rows())
    with pytest.raises(DataError, match="no row has a 'preference'"):
        read_splits(DataSettings(train=str(tmp_path / "a.jsonl")), seed=0)


def test_the_preference_column_wins_over_the_task_and_limits_are_per_preference(tmp_path):
    mixed = rows(task="t", preference="helpful") + [
        row | {"prompt": row["prompt"] + "!"} for row in rows(task="harmless")
    ]
    write_rows(tmp_path / "a.jsonl", mixed)
    settings = DataSettings(train=str(tmp_path / "a.jsonl"), max_pairs_per_preference=2)
    names, splits = read_splits(settings, seed=0)
    assert names == ["harmless", "helpful"]
    assert len(splits["train"]) == 4
    assert read_splits(settings, seed=0)[1] == splits


def test_the_plain_lora_is_as_large_as_all_experts():
    settings, training = AdapterSettings(rank=3, experts_per_group=2), TrainingSettings()
    names = ["helpful", "harmless"]
    rank = rank_of_lora("lora", settings, names)
    lora = num_trainable(get_peft_model(tiny_language_model(), lora_config(settings, training, rank=rank)))
    model = get_peft_model(tiny_language_model(), pmol_config("pmol", settings, names))
    routers = sum(p.numel() for name, p in model.named_parameters() if "pmol_router" in name)
    assert num_trainable(model) - routers == lora
    assert 2 * rank_of_lora("lora_average", settings, names) == rank


@pytest.mark.parametrize("method", ["pmol_no_group_loss", "pmol_no_empty", "pmol_lbc", "top1", "top2"])
def test_ablations_change_what_they_say_and_nothing_else(method):
    base = pmol_config("pmol", AdapterSettings(), ["a", "b"]).to_dict()
    changed = pmol_config(method, AdapterSettings(), ["a", "b"]).to_dict()
    different = {name for name in base if base[name] != changed[name]}
    expected = {
        "pmol_no_group_loss": {"group_loss"},
        "pmol_no_empty": {"empty_expert"},
        "pmol_lbc": {"group_loss"},
        "top1": {"empty_expert", "group_loss", "balance_loss", "top_k"},
        "top2": {"empty_expert", "group_loss", "balance_loss", "top_k"},
    }
    assert different == expected[method]


def test_an_export_of_routers_that_ignore_their_token_is_exact(tmp_path):
    """Then the mixture is fixed anyway: every choice has a fourth."""
    model = policy(is_blind=True)
    weights = mean_weights(model, texts(), ["helpful"] * 7)
    assert weights == pytest.approx({"helpful": 0.5, "harmless": 0.25})
    report = export_lora(model, tmp_path, weights=weights, texts=texts())
    assert report.largest_difference < 1e-5
    assert report.num_texts == 7


def test_an_export_of_real_routers_says_how_far_off_it_is_and_can_be_merged(tmp_path):
    model = policy()
    routed = completion_logps(model, texts())
    report = export_lora(model, tmp_path, weights={"helpful": 0.5, "harmless": 0.3}, texts=texts())
    merged = PeftModel.from_pretrained(tiny_language_model(), tmp_path).merge_and_unload()
    lengths = torch.tensor([len(text.completion_ids) for text in texts()])
    difference = (completion_logps(merged, texts()) - routed).abs() / lengths
    assert report.mean_difference == pytest.approx(difference.mean().item(), rel=1e-3)
    assert report.mean_difference > 0.001


def test_an_export_of_modules_trained_as_a_whole_is_refused(tmp_path):
    model = policy(modules_to_save=["lm_head"])
    with pytest.raises(ConfigError, match=r"also trained lm_head as a whole .modules_to_save."):
        export_lora(model, tmp_path, weights={"helpful": 1.0})
    assert not list(tmp_path.iterdir())


def test_an_export_knows_its_groups(tmp_path):
    with pytest.raises(ConfigError, match="there is no group 'warm'; groups are helpful, harmless"):
        export_lora(policy(), tmp_path, weights={"warm": 1.0})


def test_a_saved_adapter_says_in_its_first_lines_how_to_load_it(tmp_path):
    model = policy()
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    body = card.split("---\n", 2)[2]
    assert body.lstrip().startswith("> **This is a PMoL adapter")
    assert card.count("import prefmoe  # registers the PEFT type") == 1
    assert "library_name: peft" in card


@pytest.mark.parametrize(("given", "alpha"), [(None, 10), (3.0, 3.0)])
def test_the_alpha_of_a_plain_lora_is_twice_its_rank_unless_it_is_given(given, alpha):
    config = lora_config(AdapterSettings(), TrainingSettings(lora_alpha=given), rank=5)
    assert config.lora_alpha == alpha
