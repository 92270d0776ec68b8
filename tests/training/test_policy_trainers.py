"""Preferences reach the routers under every TRL trainer, values reach its log, and a run can be resumed."""

import math

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from data_helpers import CHATML, byte_tokenizer
from prefmoe import PMoLDPOTrainer, connect_preferences
from prefmoe.errors import ConfigError, DataError, PrefmoeWarning
from tiny_policy import pmol_config, tiny_lm, tiny_policy

pytestmark = [
    # TRL and transformers warn of each other's deprecations, of experimental trainers and of tiny models' settings.
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("error::prefmoe.errors.PrefmoeWarning"),
]

PAIRS = [
    {"prompt": f"q{i}", "chosen": f"yes{i}", "rejected": f"no{i}", "preference": [None, "a", "b"][i % 3]}
    for i in range(6)
]
PROMPTS = [{"prompt": p["prompt"], "completion": p["chosen"], "preference": p["preference"]} for p in PAIRS]
LABELED = [
    {"prompt": p["prompt"], "completion": p[side], "label": side == "chosen", "preference": p["preference"]}
    for p in PAIRS
    for side in ("chosen", "rejected")
]
ONLINE = {"num_generations": 2, "max_completion_length": 4, "beta": 0.01}


def tokenizer():
    tokenizer = byte_tokenizer(CHATML)
    tokenizer.pad_token = "</s>"
    return tokenizer


def length_reward(completions, **_):
    return [float(len(completion)) for completion in completions]


TRAINERS = {
    "dpo": (DPOTrainer, DPOConfig, PAIRS, {}),
    "kto": (KTOTrainer, KTOConfig, LABELED, {}),
    "sft": (SFTTrainer, SFTConfig, PROMPTS, {}),
    "orpo": (ORPOTrainer, ORPOConfig, PAIRS, {"max_length": 64}),
    "cpo": (CPOTrainer, CPOConfig, PAIRS, {"max_length": 64}),
    "rloo": (RLOOTrainer, RLOOConfig, PROMPTS, ONLINE),
    "grpo": (GRPOTrainer, GRPOConfig, PROMPTS, ONLINE),
}


def trainer_of(name, out, *, rows=None, model=None, connect=True, config=None, **options):
    kind, arguments, default_rows, extra = TRAINERS[name]
    settings = {
        "output_dir": str(out),
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": 0,
        **extra,
        **options,
    }
    more = {"reward_funcs": length_reward} if extra is ONLINE else {}
    if model is None:
        model, more["peft_config"] = tiny_lm(), pmol_config(**(config or {}))
    rows = Dataset.from_list(rows or default_rows)
    torch.manual_seed(0)
    trainer = kind(
        model=model,
        args=arguments(**settings),
        train_dataset=rows,
        eval_dataset=rows if "eval_strategy" in options else None,
        processing_class=tokenizer(),
        **more,
    )
    return connect_preferences(trainer) if connect else trainer


def trained(trainer):
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".default." in name}


def routers_moved(trainer):
    """Where the routers went in one step of Adam from B = 0: only what rides on the loss can have moved them."""
    before = trained(trainer)
    trainer.train()
    after = trained(trainer)
    return {name: after[name] - before[name] for name in after if "pmol_router" in name}


@pytest.mark.parametrize("name", TRAINERS)
def test_preferences_reach_the_routers_and_values_the_log(name, tmp_path):
    loud = {"group_loss_weight": 10.0}
    rows = [{**row, "preference": row["preference"] or "a"} for row in TRAINERS[name][2]]
    other = [{**row, "preference": "ba"["ab".index(row["preference"])]} for row in rows]
    trainer = trainer_of(name, tmp_path, rows=rows, config=loud)
    moved = routers_moved(trainer)
    swapped = routers_moved(trainer_of(name, tmp_path, rows=other, config=loud))
    assert any(step.abs().max() > 1e-3 for step in moved.values())
    assert any(not torch.equal(step, swapped[key]) for key, step in moved.items())
    logged = next(row for row in trainer.state.log_history if "loss" in row)
    names = {"group_loss", "load_a", "load_b", "empty_frac", "entropy", "group_accuracy"}
    assert {f"router/{name}" for name in names} <= logged.keys()
    loads = [logged[f"router/{part}"] for part in ("load_a", "load_b", "empty_frac")]
    assert sum(loads) == pytest.approx(1.0, abs=1e-4)
    assert logged["router/group_loss"] > 0.1


@pytest.mark.parametrize("loaded", [False, True])
def test_the_first_dpo_loss_is_log_2_for_a_fresh_and_for_a_loaded_adapter(loaded, tmp_path):
    model = None
    if loaded:
        tiny_policy().save_pretrained(tmp_path / "adapter")
        model = PeftModel.from_pretrained(tiny_lm(), tmp_path / "adapter", is_trainable=True)
    trainer = trainer_of("dpo", tmp_path, model=model)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_rows_without_and_with_soft_preferences(tmp_path):
    soft = [
        {**row, "preference": [[1.0, 0.0], [0.25, 0.75], [0.5, 0.5]][i % 3]} for i, row in enumerate(PAIRS)
    ]
    for rows in (PAIRS, soft):
        trainer = trainer_of("dpo", tmp_path, rows=rows)
        trainer.train()
        assert math.isfinite(trainer.state.log_history[0]["router/group_loss"])
    none = trainer_of("dpo", tmp_path, rows=[{**row, "preference": None} for row in PAIRS[:4]])
    none.train()
    assert none.state.log_history[0]["router/group_loss"] == 0.0
    assert "router/group_accuracy" not in none.state.log_history[0]


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_the_sides_of_a_pair_that_the_group_loss_looks_at(name, tmp_path):
    moved = [
        routers_moved(trainer_of(name, tmp_path, config={"group_loss_on": side, "group_loss_weight": 10.0}))
        for side in ("both", "chosen", "rejected")
    ]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert any(not torch.equal(moved[one][key], moved[other][key]) for key in moved[0])


def test_evaluation_logs_its_own_values(tmp_path):
    trainer = trainer_of("dpo", tmp_path, eval_strategy="steps", eval_steps=1)
    trainer.train()
    logged = next(row for row in trainer.state.log_history if "eval_loss" in row)
    assert {"eval_router/group_loss", "eval_router/load_a", "eval_router/group_accuracy"} <= logged.keys()


def test_passes_without_gradient_while_training_are_not_in_the_log(tmp_path):
    """KTO's mismatched pairs and answers being generated are not what the routers learn from."""
    trainer = trainer_of("dpo", tmp_path)
    trainer.model.train()
    ids = torch.full((2, 5), 7)
    with torch.no_grad():
        trainer.model(input_ids=ids)
    trainer.log({"loss": 0.0})
    assert not [key for key in trainer.state.log_history[-1] if "router" in key]
    trainer.model(input_ids=ids, preferences=torch.tensor([0, 1]))
    trainer.log({"loss": 0.0})
    assert "router/group_loss" in trainer.state.log_history[-1]


def test_a_missing_column(tmp_path):
    rows = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in PAIRS]
    with pytest.raises(
        DataError, match=r"no column 'preference'; they have .*chosen.*; add one with each row's"
    ):
        trainer_of("dpo", tmp_path, rows=rows)


def test_a_column_that_is_missing_in_the_evaluation_data_only(tmp_path):
    trainer = trainer_of("dpo", tmp_path, connect=False, eval_strategy="steps")
    bare = trainer.eval_dataset.remove_columns("preference")
    for data, name in ((bare, "evaluation"), ({"mine": bare}, "evaluation mine")):
        trainer.eval_dataset = data
        with pytest.raises(DataError, match=f"the {name} data have no column 'preference'"):
            connect_preferences(trainer)


@pytest.mark.parametrize("name", ["dpo", "orpo", "cpo", "kto"])
def test_only_tokens_of_completions_count(name, tmp_path):
    """`no` and `yes` with their number, one byte a token, and the end of the text; prompts are one byte longer or so."""
    rows = [{**row, "preference": row["preference"] or "a"} for row in TRAINERS[name][2]]
    trainer = trainer_of(name, tmp_path, rows=rows)
    counted = []
    routing = trainer.accelerator.unwrap_model(trainer.model).base_model.routings["default"]
    routing.listeners.append(lambda _, batch: counted.extend(batch.mask.sum(dim=1).tolist()))
    trainer.train()
    assert counted
    assert set(counted) <= {len("no0") + 1, len("yes0") + 1}


@pytest.mark.parametrize("name", ["orpo", "cpo"])
def test_what_an_evaluation_told_of_its_batch_is_not_told_of_the_next(name, tmp_path):
    rows = [{**row, "preference": row["preference"] or "a"} for row in PAIRS]
    trainer = trainer_of(name, tmp_path, rows=rows, eval_strategy="steps")
    model = trainer.accelerator.unwrap_model(trainer.model)
    seen = []
    model.base_model.routings["default"].listeners.append(lambda _, batch: seen.append(batch.mask))
    trainer.evaluate()
    assert seen
    model(input_ids=torch.tensor([[3, 4, 5]]))
    assert seen[-1].tolist() == [[1, 1, 1]]


def test_the_card_still_says_how_to_load_when_trl_has_written_its_own(tmp_path):
    trainer = trainer_of("dpo", tmp_path)
    trainer.save_model()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert card.count("import prefmoe") == 1
    assert "DPO" in card


def test_an_unknown_preference_names_the_nearest_group(tmp_path):
    rows = [{**row, "preference": "helpfull"} for row in PAIRS]
    config = {"groups": {"helpful": 1, "harmless": 1}}
    with pytest.raises(DataError, match=r"'helpfull' has no group; groups are .*; did you mean 'helpful'\?"):
        trainer_of("dpo", tmp_path, rows=rows, config=config).train()


def test_a_trainer_that_is_not_connected_warns(tmp_path):
    with pytest.warns(PrefmoeWarning, match=r"call prefmoe.connect_preferences\(trainer\)"):
        trainer_of("dpo", tmp_path, connect=False).train()


def test_packed_rows_lose_their_preference(tmp_path):
    with pytest.raises(DataError, match=r"packed rows lose their preference: set packing=False"):
        trainer_of("sft", tmp_path, packing=True, max_length=64).train()


def test_a_trainer_without_a_pmol_adapter(tmp_path):
    with pytest.raises(
        ConfigError, match=r"is a LlamaForCausalLM without a PMoL adapter; give the trainer peft_con"
    ):
        trainer_of("sft", tmp_path, model=tiny_lm())


def test_one_name_for_a_connected_dpo_trainer(tmp_path):
    trainer = PMoLDPOTrainer(
        model=tiny_lm(),
        args=DPOConfig(
            output_dir=str(tmp_path), max_steps=1, logging_steps=1, report_to="none", use_cpu=True, bf16=False
        ),
        train_dataset=Dataset.from_list([{**row, "kind": row.pop("preference")} for row in map(dict, PAIRS)]),
        processing_class=tokenizer(),
        peft_config=pmol_config(),
        preference_column="kind",
    )
    trainer.train()
    assert "router/group_loss" in trainer.state.log_history[0]


@pytest.mark.parametrize(
    "config", [{}, {"router": "recurrent", "router_size": 8}], ids=["linear", "recurrent"]
)
def test_a_resumed_run_equals_an_uninterrupted_one_exactly(config, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant", "config": config}
    whole = trainer_of("dpo", tmp_path / "whole", max_steps=4, **options)
    whole.train()
    half = trainer_of("dpo", tmp_path / "half", max_steps=2, **options)
    half.train()
    resumed = trainer_of("dpo", tmp_path / "half", max_steps=4, **options)
    resumed.train(resume_from_checkpoint=True)
    expected = trained(whole)
    for name, parameter in trained(resumed).items():
        assert torch.equal(parameter, expected[name]), name


def planted(out, group_loss):
    """Prompts of two preferences that their letters tell apart; accuracy of the routers at the last steps."""
    rows = [
        {"prompt": f"{word} {i}", "chosen": f"{word} yes", "rejected": f"{word} no", "preference": name}
        for i in range(8)
        for name, word in (("a", "kkkk"), ("b", "zzzz"))
    ]
    config = {"group_loss": group_loss, "group_loss_weight": 1.0, "groups": {"a": 1, "b": 1}}
    trainer = trainer_of("dpo", out, rows=rows, config=config, max_steps=20, logging_steps=5)
    trainer.train()
    return trainer.state.log_history[3]["router/group_accuracy"]


def test_routers_tell_planted_preferences_apart_with_the_group_loss(tmp_path):
    assert planted(tmp_path, "soft") > 0.95


def test_without_the_group_loss_they_do_not(tmp_path):
    assert planted(tmp_path, "none") < 0.8
