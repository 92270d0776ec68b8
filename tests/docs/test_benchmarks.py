"""The speed benchmarks run, agree with their peers before they time anything, and write what they say they write."""

import json
import random

import adapter_speed
import aggregator_rules
import capability_gain
import cost_growth
import dpo_step
import judge_labels
import label_throughput
import pytest
import router_settings
import scoring_speed
import time_shares
import torch
import training_speed
import trl_accuracy
import yaml
from judge_labels import KINDS

from cli_helpers import pair_rows, write_config
from data_helpers import CHATML, byte_tokenizer, write_rows
from prefmoe.reward.assemble import TaskAggregator, assemble_model, expert_states
from prefmoe.reward.evaluate import margins_by_task, score_pairs
from prefmoe.reward.phases import ALL, make_folds, pairs_of, select_rows
from prefmoe.reward.settings import load_settings
from prefmoe.reward.splits import read_splits
from prefmoe.reward.train import train_models, train_phases, validation_features
from prefmoe.reward.workbench import build_workbench
from tiny import tiny_backbone, tiny_language_model
from tiny_run import tiny_bench, tiny_settings

SMALL = ["--smoke", "--num-layers", "2", "--split-layer", "1"]

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning"
)


def test_scoring_speed(tmp_path):
    out = tmp_path / "new" / "scoring.json"
    few = ["--dtype", "float32", "--pairs", "2", "--experts", "3", "--repeats", "1"]
    scoring_speed.main([*SMALL, *few, "--out", str(out)])
    loads = json.loads(out.read_text())["loads"]
    assert set(loads) == {"pairs", "best_of_16"}
    for load in loads.values():
        assert set(load["over_ours"]) == set(scoring_speed.PEERS)
        assert all(0 <= value < 1e-3 for value in load["largest_difference_of_rewards"].values())
    # 2 prompts of 40 tokens with 2 x 8, one layer of trunk and one layer under 3 experts
    assert loads["pairs"]["floor_layer_tokens"] == 2 * (40 + 2 * 8) * (1 + 3)
    assert loads["pairs"]["naive_over_floor"] == pytest.approx(3 * 2 * 4 * 48 / (112 * 4), abs=1e-3)


def test_scoring_speed_times_nothing_where_rewards_differ():
    rewards = {name: lambda: torch.tensor([[0.0, 1.0]]) for name in ("ours", *scoring_speed.PEERS)}
    rewards["mixed_batch"] = lambda: torch.tensor([[0.0, 1.1]])
    with pytest.raises(SystemExit, match=r"differ from ours.*mixed_batch"):
        scoring_speed.check_equal(rewards, torch.float32)


def test_cost_growth(tmp_path):
    picture = tmp_path / "growth.png"
    options = ["--smoke", "--repeats", "1", "--prompt-tokens", "16", "--picture", str(picture)]
    curves = cost_growth.main(options)["curves"]
    assert [point["value"] for point in curves["experts"]] == [1, 2, 4, 8]
    assert picture.stat().st_size > 10_000


@pytest.mark.slow
def test_training_speed_also_from_a_finished_folder(tmp_path):
    options = ["--smoke", "--repeats", "1", "--slice", "2", "--folder", str(tmp_path / "run")]
    first = training_speed.main(options)
    assert first["runs"] == 3 + 9  # task adapters and capability experts of the world
    assert set(first["estimated_seconds"]) == {"release", "trl"}
    parts = [part["ours_seconds"] for part in first["part_by_part"].values()]
    assert sum(parts) == pytest.approx(first["ours_seconds"], abs=0.3)
    assert min(parts) >= 0
    again = training_speed.main(options)
    assert again["ours_seconds_by_step"]["training"] == first["ours_seconds_by_step"]["training"]


@pytest.mark.slow
def test_capability_gain(tmp_path):
    options = ["--smoke", "--folder", str(tmp_path / "run"), "--pairs-per-task", "4", "--draws", "2"]
    found = capability_gain.main(options)
    assert set(found["variants"]) == set(capability_gain.VARIANTS)
    assert found["variants"]["head"]["minus_head"]["value"] == 0
    for variant in found["variants"].values():
        assert 0 <= variant["accuracy"] <= 1
        assert variant["accuracy"] == pytest.approx(sum(variant["by_draw"]) / 2, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["task_head", "linear_scores", "mlp"])
def test_aggregator_rules_judge_an_aggregator_as_the_model_that_holds_it_does(tmp_path, kind):
    kinds = {"kinds": ["linear_scores", "mlp"]}
    bench = tiny_bench(tiny_settings(tmp_path, phase3=kinds, methods=["dmoerm"]))
    model = train_models(bench)["dmoerm"]
    candidates, judged = aggregator_rules.judge(bench, split="test")
    assert list(aggregator_rules.gaining(2)(candidates).values()) == model.config.aggregators
    trained = train_phases(bench, make_folds(bench), crossfit=True)
    states = expert_states(bench, trained, ALL)
    holding = assemble_model(
        bench,
        bench.tasks,
        states,
        validation_features(bench, states, bench.tasks, name="dmoerm"),
        method="dmoerm",
        router=model.router,
        aggregators={task: TaskAggregator(kind, found.modules[kind]) for task, found in candidates.items()},
    )
    scores = score_pairs(holding, bench.trunk, bench.test, routing="given")
    for task, margins in margins_by_task(bench.test, *scores).items():
        found = judged[task].margins(candidates[task].modules[kind]).detach()
        expected = found / holding.reward_std[list(bench.tasks).index(task)]
        torch.testing.assert_close(torch.tensor(margins), expected, rtol=1e-3, atol=1e-4)


def test_a_rule_may_leave_kinds_out():
    hits = {"task_head": torch.zeros(50), "mlp": torch.ones(50), "linear_scores": torch.ones(50) * 0.9}
    modules = {kind: torch.nn.Identity() for kind in hits}
    validation = dict.fromkeys(hits, torch.ones(1))
    found = {"all": aggregator_rules.Candidates(modules, hits, list(range(50)), validation)}
    assert aggregator_rules.gaining(2)(found) == {"all": "mlp"}
    assert aggregator_rules.gaining(2, without=["mlp"])(found) == {"all": "linear_scores"}


def test_a_task_alone_is_judged_as_if_there_were_no_other():
    """A gain of 0.2 on one task, and a loss of 0.4 on the other."""
    hits = {
        sign: {"task_head": torch.full((50,), 0.5), "mlp": torch.full((50,), 0.5 + sign)}
        for sign in (0.2, -0.4)
    }
    modules = {kind: torch.nn.Identity() for kind in hits[0.2]}
    found = {
        str(sign): aggregator_rules.Candidates(
            modules, rows, list(range(50)), dict.fromkeys(rows, torch.ones(1))
        )
        for sign, rows in hits.items()
    }
    assert aggregator_rules.gaining(1)(found) == {"0.2": "task_head", "-0.4": "task_head"}
    assert aggregator_rules.gaining(1, alone=True)(found) == {"0.2": "mlp", "-0.4": "task_head"}


def test_labels_that_decide_are_found_by_the_aggregator():
    """States that say nothing, and a capability whose label says which side people chose."""
    generator = torch.Generator().manual_seed(0)

    def pairs(first, number):
        rows = [capability_gain.PairRow(0, 1, first + i, label=float(i % 2)) for i in range(number)]
        sides = torch.tensor([1.0 if row.label else -1.0 for row in rows])
        return capability_gain.Pairs(torch.randn(number, 2, 8, generator=generator), rows, {"all": sides})

    hits, _ = capability_gain.judge(pairs(0, 60), pairs(100, 40), size=40, seed=0)
    chosen = torch.tensor([float(i % 2) for i in range(40)])
    # A hit is a margin for the side written first, which half of these labels call the worse one.
    assert hits["labels"].tolist() == chosen.tolist()
    assert hits["head"].tolist() != chosen.tolist()


def long_rows(split, num):
    """Rows whose chosen side every rule for shortness finds worse."""
    return [{**row, "chosen": f"yes {row['chosen']} so it is"} for row in pair_rows(split, num=num)]


@pytest.fixture
def small_config(tmp_path):
    """A config of a quick training whose rules tell all sides apart, and whose rows bring labels along."""
    tiny_backbone().save_pretrained(tmp_path / "backbone")
    byte_tokenizer(CHATML).save_pretrained(tmp_path / "backbone")
    tasks = {
        "tasks": {
            task: {
                "description": "Talk.",
                "capabilities": {"short": {"sentence": "It is short.", "rule": "concise"}},
            }
            for task in ("advice", "facts")
        }
    }
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(tasks), encoding="utf-8")
    config = write_config(tmp_path, tmp_path / "backbone")
    for split, num in {"train": 8, "validation": 4, "test": 4}.items():
        write_rows(tmp_path / f"{split}.jsonl", long_rows(split, num))
    content = yaml.safe_load(config.read_text(encoding="utf-8"))
    content["data"] |= {"labels": "rules", "tasks_file": str(tmp_path / "tasks.yaml")}
    config.write_text(yaml.safe_dump(content), encoding="utf-8")
    return config


def test_judge_labels_differ_in_the_training_labels_only(small_config, tmp_path):
    rows = long_rows("train", 8)
    kinds = [{"short": 1}, {"short": 1}, {}, {}]
    judged = [
        {**row, "capabilities": labels, "labeled_by": dict.fromkeys(labels, "m")}
        for row, labels in zip(rows, kinds * 4, strict=True)
    ]
    labelled, out = write_rows(tmp_path / "labelled.jsonl", judged), tmp_path / "result.json"
    options = [str(labelled), "--config", str(small_config), "--folder", str(tmp_path / "kinds")]
    judge_labels.main([*options, "--out", str(out)])
    found = json.loads(out.read_text())
    assert (found["judge"], found["simulated"], found["pairs"]) == (["m"], False, 16)
    assert found["labels"] == {"rules": 16, "judge": 8, "both": 16}
    assert set(found["accuracy"]) == set(judge_labels.KINDS)
    for accuracy in found["accuracy"].values():
        assert set(accuracy) == {"per_task", "dmoerm"}
    for sides in found["experts_side_with_rules"].values():
        assert sides["experts"] == 2
        assert 0 <= sides["share"] <= 1
    splits = {kind: read_splits(load_settings(tmp_path / "kinds" / f"{kind}.yaml").data) for kind in KINDS}
    assert not any(pair.capabilities for of_kind in splits.values() for pair in of_kind["validation"])
    train = {kind: [pair.capabilities for pair in of_kind["train"]] for kind, of_kind in splits.items()}
    assert train["judge"] == [row["capabilities"] for row in judged]
    assert train["rules"] == [{"short": -1}] * 16
    assert train["both"] == [labels or {"short": -1} for labels in train["judge"]]


@pytest.mark.slow
def test_trl_accuracy_on_the_pairs_of_a_run(small_config, tmp_path, monkeypatch):
    run, out = tmp_path / "run", tmp_path / "result.json"
    train_models(build_workbench(load_settings(small_config, ["methods=[dmoerm]"], out=run)))
    options = [str(run), "--folder", str(tmp_path / "trl"), "--test", str(tmp_path / "test.jsonl")]
    first = trl_accuracy.main([*options, "--rates", "1e-3", "1e-2", "--out", str(out)])
    assert json.loads(out.read_text())["training_pairs"] == 8  # half of them, as the experts
    rates = first["mix_on_validation_pairs"]
    assert set(rates) == {1e-3, 1e-2}
    assert rates[first["learning_rate"]] == max(rates.values())
    methods = first["test"]["methods"]
    assert set(methods) == {"dmoerm", "trl_mix", "trl_per_task"}
    for found in methods.values():
        assert {task: row["pairs"] for task, row in found["tasks"].items()} == {"advice": 4, "facts": 4}
    monkeypatch.setattr(trl_accuracy, "trl_trainer", None)  # nothing is trained twice
    again = trl_accuracy.main([*options, "--rates", "1e-3", "1e-2"])
    assert again["test"]["methods"] == methods


def test_trl_trains_on_what_the_experts_of_a_run_train_on(small_config, tmp_path):
    changes = ["phase3.split=paper", "phase3.expert_fraction=0.5", "data.max_pairs_per_task=6"]
    settings = load_settings(small_config, changes, out=tmp_path / "run")
    bench = build_workbench(settings)
    wanted = select_rows(bench.train, pairs_of(fold=make_folds(bench)[0]))
    found = trl_accuracy.Peer(
        load_settings(small_config, changes, out=tmp_path / "trl"), tmp_path / "test.jsonl"
    )
    assert [row.prompt for row in found.splits["train"].rows] == [row.prompt for row in wanted]
    assert 0 < len(wanted) < len(bench.train.rows) == 12
    assert len(found.splits["validation"].rows) == len(bench.validation.rows)


@pytest.mark.slow
def test_a_saved_trl_model_scores_as_the_trained_one_does(small_config, tmp_path):
    peer = trl_accuracy.Peer(load_settings(small_config, [], out=tmp_path / "trl"), tmp_path / "test.jsonl")
    trainer = peer._trainer(peer.splits["train"], 0.05, str(tmp_path / "there"))
    trainer.train()
    test = peer.splits["test"]
    wanted = []
    for row in test.rows:
        ids = [torch.tensor([peer.table.texts[text].input_ids]) for text in row[:2]]
        chosen, rejected = (trainer.model.eval()(input_ids=side).logits.item() for side in ids)
        wanted.append(chosen - rejected)
    found = peer.margins(trl_accuracy.MIX, 0.05, "test")
    assert [m for row in found.values() for m in row] == pytest.approx(wanted, abs=1e-5)
    assert max(map(abs, wanted)) > 1e-3


def test_a_simulated_judge_errs_as_arithmetic_says(small_config, tmp_path):
    options = ["--simulate", "0.8", "--config", str(small_config), "--folder", str(tmp_path / "kinds")]
    found = judge_labels.main([*options, "--dry-run"])
    assert found["simulated"]
    assert "no language model was asked" in found["judge"]
    assert (found["simulated_accuracy"], found["simulated_position_bias"]) == (0.8, 0.15)
    rng, number = random.Random(0), 20_000
    verdicts = [judge_labels.verdict(side, 0.8, rng) for side in (1, -1) for _ in range(number // 2)]
    right, wrong = 0.8**2 - 0.15**2, 0.2**2 - 0.15**2  # prefmoe.labeling.judge.verdicts
    kept = [
        (side, v.label) for side, v in zip([1] * 10_000 + [-1] * 10_000, verdicts, strict=True) if v.label
    ]
    assert len(kept) / number == pytest.approx(right + wrong, abs=0.015)  # four standard errors
    assert sum(a == b for a, b in kept) / len(kept) == pytest.approx(right / (right + wrong), abs=0.007)
    first = [v.given.choice == "1" for v in verdicts] + [v.swapped.choice == "1" for v in verdicts]
    assert sum(first) / len(first) == pytest.approx(0.65, abs=0.01)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "give either a labelled file or --simulate"),
        (["x.jsonl", "--simulate", "0.8"], "give either a labelled file or --simulate"),
        (["--simulate", "0.9"], "choose from 0.15 to 0.85"),
        (["--simulate", "0.8", "--soft-labels"], "gives no probabilities"),
    ],
)
def test_judge_labels_refuses_what_does_not_fit(options, sentence, capsys):
    with pytest.raises(SystemExit):
        judge_labels.main(options)
    assert sentence in capsys.readouterr().err


@pytest.mark.allow_hosts(["127.0.0.1"])
def test_label_throughput_counts_calls_and_keeps_to_the_ideal(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    out = tmp_path / "throughput.json"
    label_throughput.main(["--smoke", "--latency", "0.02", "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["calls"] == 40 - 2 - 1  # the first pair warms up, the clock starts with an answer
    assert found["ideal"] == 8 / 0.02
    share = found["share_of_ideal"]
    assert share["value"] == pytest.approx(found["calls_per_second"] / found["ideal"], abs=1e-3)
    assert found["seconds"] >= 0.02 * (37 // 8)  # never more than eight at a time
    assert found["cpu_ms_per_call"] > found["server_cpu_ms_per_call"] > 0
    assert (share["target"], found["machine"]["device"] != "") == (0.8, True)


def test_adapter_speed(tmp_path):
    out = tmp_path / "adapters.json"
    adapter_speed.main(["--smoke", "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["trainable"]["pmol"] == found["trainable"]["loop"] > found["trainable"]["lora"]  # routers
    for name, target in adapter_speed.TARGETS.items():
        assert found[name]["target"] == target
        assert found[name]["reached"] == (found[name]["value"] <= target)
        assert found[name]["value"] > 0
    assert found["saved_loop_over_lora"] > found["saved_pmol_over_lora"]["value"]


def test_the_group_loss_counts_in_the_memory_of_a_step():
    model = adapter_speed.build("pmol", "tiny", torch.float32, "cpu").train()
    ids = torch.randint(3, 300, (3, 16), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    with_loss = adapter_speed.saved_bytes(model, batch)
    model.peft_config["default"].group_loss = "none"
    assert adapter_speed.saved_bytes(model, batch) < with_loss


@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_dpo_step(tmp_path):
    tiny_language_model().save_pretrained(tmp_path / "model")
    byte_tokenizer(CHATML).save_pretrained(tmp_path / "model")
    rows = [
        {"prompt": f"{name} {i}", "chosen": "yes", "rejected": f"no {i}", "preference": name}
        for i in range(4)
        for name in ("a", "b")
    ]
    write_rows(tmp_path / "train.jsonl", rows)
    config = {
        "data": {"train": str(tmp_path / "train.jsonl")},
        "model": {"name": str(tmp_path / "model"), "max_length": 64},
        "training": {"batch_pairs": 4},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    out = tmp_path / "step.json"
    dpo_step.main([str(tmp_path / "config.yaml"), "--repeats", "2", "--out", str(out)])
    found = json.loads(out.read_text())
    assert set(found["methods"]) == {"lora", "pmol"}
    assert all(method["trl_over_shared"] > 0 for method in found["methods"].values())
    assert (
        found["tokens"]["of_completions"] < found["tokens"]["prompts_once"] < found["tokens"]["of_both_sides"]
    )


def test_time_shares_are_shares():
    shares = time_shares.main([*SMALL, "--prompts", "2"])["shares"]
    for found in shares.values():
        assert sum(found.values()) == pytest.approx(1, abs=0.01)
        assert found["products of the backbone"] > 0
        assert found["products of the experts"] > 0


def test_router_settings_tells_tasks_apart_whose_prompts_differ(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    tiny_backbone().save_pretrained(tmp_path / "backbone")
    byte_tokenizer(CHATML).save_pretrained(tmp_path / "backbone")
    for split, num in {"train": 24, "validation": 8, "test": 6}.items():
        rows = [
            {
                "prompt": f"{sign * 9} {split[:2]} {i}",
                "chosen": f"yes {i}",
                "rejected": f"no {i}",
                "task": task,
            }
            for i in range(num)
            for task, sign in {"calm": ".", "loud": "!"}.items()
        ]
        write_rows(tmp_path / f"{split}.jsonl", rows)
    config = {
        "data": {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "validation", "test")},
        "backbone": {"name": str(tmp_path / "backbone"), "max_length": 128},
        "experts": {"split_layer": 2},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    options = [str(tmp_path / "config.yaml"), "--out", str(tmp_path / "out")]
    router_settings.main([*options, "--l2", "0.01", "--test"])
    assert capsys.readouterr().out.startswith("test: 1.0000")
    router_settings.main([*options, "--l2", "0.01"])
    table = capsys.readouterr().out
    assert all(name in table for name in router_settings.POOLINGS)
    assert table.count("1.0000 (") == len(router_settings.POOLINGS)
