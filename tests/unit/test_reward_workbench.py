import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, PreTrainedModel

from data_helpers import CHATML, assistant, byte_tokenizer, make_pair, user, write_rows
from prefmoe.errors import ConfigError, DataError
from prefmoe.records import PreferencePair
from prefmoe.reward.settings import DataSettings
from prefmoe.reward.splits import (
    RewardTrainingWarning,
    draw_per_task,
    find_capabilities,
    further_pairs,
    label_capabilities,
    read_splits,
    with_task,
)
from prefmoe.reward.workbench import Workbench, build_workbench
from tiny import tiny_backbone
from tiny_run import planted_pairs, planted_splits, tiny_bench, tiny_settings

TASKS_FILE = "tasks: {a: {description: A task., capabilities: {concise: {sentence: Short., rule: concise}}}}"


def rows(number: int, split: str) -> list[dict[str, object]]:
    sides = {"chosen": "yes", "rejected": "no"}
    return [{"prompt": f"{split} {i}", "task": "ab"[i % 2], **sides} for i in range(number)]


def test_splits_are_read_from_their_files(tmp_path: Path) -> None:
    files = {name: str(write_rows(tmp_path / f"{name}.jsonl", rows(4, name))) for name in ("t", "v", "x")}
    splits = read_splits(DataSettings(train=files["t"], validation=files["v"], test=files["x"]))
    assert {name: len(pairs) for name, pairs in splits.items()} == {"train": 4, "validation": 4, "test": 4}


def test_validation_is_set_aside_by_prompt_and_seed(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "t.jsonl", [row for row in rows(40, "t") for _ in range(2)][:78])
    data = DataSettings(train=str(file), validation_fraction=0.25)
    splits, again, other = (read_splits(data, seed) for seed in (0, 0, 1))
    prompts = {name: {pair.prompt for pair in pairs} for name, pairs in splits.items()}
    assert not prompts["train"] & prompts["validation"]
    assert len(splits["validation"]) == pytest.approx(0.25 * 78, abs=2)
    assert splits == again
    assert splits["validation"] != other["validation"]
    assert splits["test"] == []


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_prompt_in_two_splits_is_refused(tmp_path: Path, split: str) -> None:
    train, same = (write_rows(tmp_path / f"{name}.jsonl", rows(4, "t")) for name in ("t", "same"))
    other = write_rows(tmp_path / "other.jsonl", rows(4, "other"))
    files = {"validation": str(other)} | {split: str(same)}
    with pytest.raises(DataError, match=f"stands in train and in {split}"):
        read_splits(DataSettings(train=str(train), **files))


def test_further_pairs_may_be_the_training_file_itself(tmp_path: Path) -> None:
    """Then they are those that a limit left out; none has a prompt of validation or test."""
    train = write_rows(tmp_path / "train.jsonl", rows(40, "train"))
    test = write_rows(tmp_path / "test.jsonl", rows(4, "test"))
    more = write_rows(tmp_path / "more.jsonl", [*rows(40, "train"), *rows(4, "test")])
    data = DataSettings(train=str(train), test=str(test), capability_train=str(more), validation_fraction=0.2)
    found = read_splits(data)
    assert [pair.prompt for pair in found["capability_train"]] == [pair.prompt for pair in found["train"]]
    drawn = draw_per_task(found["train"], 5, seed=0)
    left = further_pairs(found["capability_train"], [drawn[0].swap(), *drawn[1:]])
    assert len(left) == len(found["train"]) - 10
    assert not {pair.prompt for pair in left} & {pair.prompt for pair in drawn}


def test_further_pairs_that_cannot_help_are_told(tmp_path: Path) -> None:
    train = planted_pairs(4, split="train")
    with pytest.warns(RewardTrainingWarning, match="adds no pair: all are training pairs"):
        assert further_pairs(train, train) == []
    strange = [replace(pair, task="tepid") for pair in planted_pairs(2, split="more")]
    more = planted_pairs(3, split="other")
    with pytest.warns(RewardTrainingWarning, match="no training pair has the task 'tepid'"):
        assert further_pairs([*strange, *more], train) == more


def test_an_empty_training_file(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text("")
    with pytest.raises(DataError, match="has no rows"):
        read_splits(DataSettings(train=str(file)))


def test_a_task_whose_training_pairs_all_have_weight_0_is_refused(tmp_path: Path) -> None:
    splits = planted_splits()
    of_hot = [replace(p, weight=0.0) if p.task == "hot" else p for p in splits["train"]]
    with pytest.raises(DataError, match="^all training pairs of 'hot' have weight 0, .*above 0 or drop"):
        tiny_bench(tiny_settings(tmp_path), pairs=splits | {"train": of_hot})
    of_all = [replace(pair, weight=0.0) for pair in splits["train"]]
    with pytest.raises(DataError, match="all training pairs of 'cold', 'hot' have weight 0"):
        tiny_bench(tiny_settings(tmp_path), pairs=splits | {"train": of_all})
    one_left = [replace(p, weight=0.0) if p.task == "hot" else p for p in splits["train"][:-1]]
    tiny_bench(tiny_settings(tmp_path), pairs=splits | {"train": [*one_left, splits["train"][-1]]})


def test_a_limit_keeps_so_many_pairs_of_every_task_in_their_order() -> None:
    pairs = planted_pairs(20, split="train") + planted_pairs(3, split="more", tasks=["hot"])
    drawn = draw_per_task(pairs, 6, 0)
    assert Counter(pair.task for pair in drawn) == {"cold": 6, "hot": 6}
    assert drawn == [pair for pair in pairs if pair in drawn]
    assert drawn == draw_per_task(pairs, 6, 0)
    assert drawn != draw_per_task(pairs, 6, 1)
    assert draw_per_task(pairs, None, 0) == pairs


def test_pairs_without_tasks_are_one_task_and_a_mixture_is_refused() -> None:
    pairs = [make_pair("p1"), make_pair("p2")]
    assert {pair.task for pair in with_task(pairs, "train")} == {"all"}
    with pytest.raises(DataError, match="train: 1 of 2 pairs have no 'task', the first is 'p2'"):
        with_task([replace(pairs[0], task="a"), pairs[1]], "train")


def test_rules_need_a_tasks_file() -> None:
    with pytest.raises(ConfigError, match=r"data\.tasks_file is not given"):
        label_capabilities([], DataSettings(train="x", labels="rules"))


def test_rules_label_what_columns_leave_open(tmp_path: Path) -> None:
    file = tmp_path / "tasks.yaml"
    file.write_text(TASKS_FILE)
    pair = make_pair(task="a", rejected=assistant("No idea at all. " * 9))
    labelled = label_capabilities([pair], DataSettings(train="x", labels="rules", tasks_file=str(file)))
    assert labelled[0].capabilities == {"concise": 1}


def capable(**labels: int) -> PreferencePair:
    return make_pair(task="a", capabilities=labels)


def test_capabilities_without_a_label_are_left_out_with_a_warning() -> None:
    pairs = [capable(warm=1, clear=0), capable(warm=-1, brief=1), replace(make_pair(), task="b")]
    with pytest.warns(RewardTrainingWarning, match="which side is better on a/clear; left out"):
        assert find_capabilities(pairs, DataSettings(train="x")) == {"a": ["brief", "warm"], "b": []}


def test_capabilities_of_the_tasks_file_that_nobody_labelled_are_named(tmp_path: Path) -> None:
    file = tmp_path / "tasks.yaml"
    file.write_text(TASKS_FILE)
    with pytest.warns(RewardTrainingWarning, match="a/concise"):
        found = find_capabilities([capable(warm=1)], DataSettings(train="x", tasks_file=str(file)))
    assert found == {"a": ["warm"]}


def test_a_small_task_is_named(tmp_path: Path) -> None:
    splits = planted_splits()
    splits["train"] += [replace(p, task="rare") for p in planted_pairs(2, split="rare", tasks=["hot"])]
    with pytest.warns(RewardTrainingWarning, match=r"'rare' \(2 training, 0 validation\)"):
        tiny_bench(tiny_settings(tmp_path), splits)


def test_a_split_layer_above_the_backbone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"split_layer=3 leaves no layer.*has 3 layers, choose 0 to 2"):
        tiny_bench(tiny_settings(tmp_path / "run", experts={"split_layer": 3}))
    assert not (tmp_path / "run").exists()


def test_training_pairs_that_became_equal_are_refused_and_test_pairs_are_ties(tmp_path: Path) -> None:
    sides = {"chosen": assistant("x" * 80 + "a"), "rejected": assistant("x" * 80 + "b")}
    same = make_pair("same", task="hot", **sides)
    splits = planted_splits()
    bench = tiny_bench(tiny_settings(tmp_path / "1"), splits | {"test": [same]})
    assert bench.test.num_equal == 1
    assert bench.test.rows[0].chosen == bench.test.rows[0].rejected
    with pytest.raises(DataError, match="'same': both sides are equal after truncation to max_length=64"):
        tiny_bench(tiny_settings(tmp_path / "2"), splits | {"train": [*splits["train"], same]})


def test_truncation_is_counted_and_logged(tmp_path: Path) -> None:
    splits = planted_splits()
    long = replace(splits["test"][0], prompt=user("hot " + "x" * 80))
    bench = tiny_bench(tiny_settings(tmp_path), splits | {"test": [long, *splits["test"][1:]]})
    assert (bench.train.num_truncated, bench.test.num_truncated) == (0, 1)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {line["split"]: line["truncated"] for line in lines} == {"train": 0, "validation": 0, "test": 1}


def test_the_router_learns_from_prompts_cut_as_a_completion_cuts_them(tmp_path: Path) -> None:
    splits = planted_splits()
    long = replace(splits["train"][0], prompt=user("cold " + "".join(map(str, range(60)))))
    bench = tiny_bench(tiny_settings(tmp_path), splits | {"train": [long, *splits["train"][1:]]})
    assert bench.train.num_truncated == 1
    prompts = [bench.table.texts[text].input_ids for text, _ in bench.prompts]
    chosen = [bench.table.texts[row.chosen] for row in bench.train.rows]
    assert prompts == [text.input_ids[: text.prompt_length] for text in chosen]
    assert [task for _, task in bench.prompts] == [pair.task for pair in bench.train.pairs]


def test_limits_of_the_settings_are_kept(tmp_path: Path) -> None:
    changes = {"max_pairs_per_task": 7, "max_validation_pairs_per_task": 3}
    bench = tiny_bench(tiny_settings(tmp_path, data=changes))
    assert Counter(p.task for p in bench.train.pairs) == {"cold": 7, "hot": 7}
    assert Counter(p.task for p in bench.validation.pairs) == {"cold": 3, "hot": 3}
    assert len(bench.test.pairs) == 32


def saved_backbone(folder: Path, family: str = "llama", *, tokenizer: bool = True) -> PreTrainedModel:
    backbone = tiny_backbone(family, layers=2)
    with torch.no_grad():  # biases start at zero, where a lost one would not be seen
        for parameter in backbone.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    backbone.save_pretrained(folder)
    if tokenizer:
        byte_tokenizer(CHATML).save_pretrained(folder)
    return backbone


def bench_from(folder: Path, **changes: object) -> Workbench:
    settings = tiny_settings(folder / "run", backbone={"name": str(folder / "body"), **changes})
    return build_workbench(settings, pairs=planted_splits())


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_every_weight_of_the_backbone_arrives__defect_2(tmp_path: Path, family: str) -> None:
    """The release builds its own layers and would need a map of names; Qwen's biases have no place in them."""
    saved = saved_backbone(tmp_path / "body", family).state_dict()
    loaded = bench_from(tmp_path).backbone.state_dict()
    assert any(name.endswith("q_proj.bias") for name in saved) == (family == "qwen2")
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())


def test_a_family_whose_layers_we_would_run_wrongly_is_refused__defect_2(tmp_path: Path) -> None:
    """GPT-2 has one fused matrix for queries, keys and values."""
    AutoModel.from_config(
        AutoConfig.for_model("gpt2", vocab_size=300, n_embd=32, n_layer=2, n_head=4)
    ).save_pretrained(tmp_path / "body")
    with pytest.raises(ConfigError, match="backbone of type 'gpt2' is not supported"):
        bench_from(tmp_path)


def test_a_backbone_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be loaded"):
        bench_from(tmp_path)


def test_a_backbone_without_a_tokenizer(tmp_path: Path) -> None:
    saved_backbone(tmp_path / "body", tokenizer=False)
    with pytest.raises(ConfigError, match="comes without a tokenizer"):
        bench_from(tmp_path)


def test_texts_longer_than_the_backbone_was_made_for(tmp_path: Path) -> None:
    saved_backbone(tmp_path / "body")
    with pytest.raises(ConfigError, match="max_length=513 is more than the 512 tokens.*choose 512 or less"):
        bench_from(tmp_path, max_length=513)


def test_only_the_first_layers_are_kept(tmp_path: Path) -> None:
    saved_backbone(tmp_path / "body")
    with pytest.raises(ConfigError, match="split_layer=1 leaves no layer.*has 1 layers"):
        bench_from(tmp_path, num_layers=1)


def test_a_capability_may_not_have_the_name_of_the_general_expert(tmp_path: Path) -> None:
    splits = planted_splits()
    splits["train"][0] = replace(splits["train"][0], capabilities={"general": 1})
    settings = tiny_settings(tmp_path, phase1={"shared_start": 0.5}, phase3={"general_expert": True})
    with pytest.raises(ConfigError, match="a capability is called 'general'.*rename it or drop"):
        tiny_bench(settings, splits)
