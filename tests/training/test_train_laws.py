"""Laws of the training engine: what must hold for any experts, pairs and settings."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from transformers.integrations import integration_utils
from transformers.trainer_callback import TrainerControl, TrainerState

from prefmoe.errors import ConfigError
from prefmoe.reward import jobs as jobs_module
from prefmoe.reward.assemble import rows_by_task
from prefmoe.reward.batches import training_order
from prefmoe.reward.checkpoints import ExpertCheckpoint
from prefmoe.reward.evaluate import score_pairs
from prefmoe.reward.experts import Experts, ExpertState
from prefmoe.reward.jobs import ExpertJob, TrainingSettings
from prefmoe.reward.texts import PairRow
from prefmoe.reward.train import train_models
from prefmoe.reward.trainer import validate
from prefmoe.reward.workbench import Workbench
from tiny_run import (
    flipped,
    planted_pairs,
    planted_splits,
    task_jobs,
    tiny_bench,
    tiny_experts,
    tiny_settings,
    train_tiny,
    with_random_labels,
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return tiny_bench(tiny_settings(tmp_path_factory.mktemp("laws") / "run"))


# From convex heads, with steps that no float32 weight notices: no validation can be better than the first.
NO_GAIN = {"learning_rate": 1e-30, "head_learning_rate": 1e-30, "head_start": True}


class Watch(TrainerCallback):
    """Keeps what the Trainer shows at some moments."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []
        self.optimized: set[int] = set()
        self.parameters: dict[str, torch.nn.Parameter] = {}
        self.saved: list[tuple[Path, dict[str, torch.Tensor]]] = []
        self.training_flags: list[bool] = []
        self.clipped: list[float] = []
        self.steps = 0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.optimized = {id(p) for group in kwargs["optimizer"].param_groups for p in group["params"]}
        self.parameters = dict(kwargs["model"].named_parameters())

    def on_pre_optimizer_step(self, *_: Any, **kwargs: Any) -> None:
        grads = [p.grad.norm() for p in kwargs["model"].parameters() if p.grad is not None]
        self.clipped.append(torch.stack(grads).norm().item())

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.training_flags.append(kwargs["model"].experts.training)
        self.steps = state.global_step

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        now = {name: p.detach().clone() for name, p in self.parameters.items() if p.requires_grad}
        self.saved.append((Path(args.output_dir) / f"checkpoint-{state.global_step}", now))

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.logs.append(dict(kwargs["logs"]))

    def values(self, name: str) -> list[float]:
        return [line[name] for line in self.logs if name in line]


def distance(a: ExpertState, b: ExpertState) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.mark.parametrize("num_dense", [0, 2])
def test_every_tensor_that_needs_grad_is_optimized_and_saved__defect_6(
    bench: Workbench, tmp_path: Path, num_dense: int
) -> None:
    """The release keeps its heads in a plain dict: neither optimized nor saved."""
    experts = tiny_experts(bench, 2, num_dense=num_dense)
    experts.dense_ids.copy_(torch.arange(2) * (num_dense > 0))
    watch = Watch()
    train_tiny(bench, tmp_path, experts=experts, callbacks=[watch])
    needing = {name: p for name, p in watch.parameters.items() if p.requires_grad}
    assert {id(p) for p in needing.values()} == watch.optimized
    assert {name.rsplit(".", 1)[-1] for name in needing} >= {"A", "B", "head_weight"}
    assert any("dense" in name for name in needing) == bool(num_dense)

    folder, then = watch.saved[-1]
    current, _, _ = ExpertCheckpoint.load_all(folder)
    loaded = tiny_experts(bench, 2, num_dense=num_dense)
    loaded.dense_ids.copy_(experts.dense_ids)
    for expert, state in enumerate(current):
        loaded.load_expert(expert, state)
    found = {f"experts.{name}": p for name, p in loaded.named_parameters() if p.requires_grad}
    assert found.keys() == then.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in then.items())


def test_training_moves_every_trained_tensor_and_no_frozen_one(bench: Workbench, tmp_path: Path) -> None:
    experts = tiny_experts(bench, 2)
    before = {name: p.detach().clone() for name, p in experts.named_parameters()}
    frozen = {name: p.detach().clone() for name, p in bench.backbone.named_parameters()}
    train_tiny(bench, tmp_path, experts=experts)
    same = {name for name, p in experts.named_parameters() if torch.equal(p, before[name])}
    assert same == {"head_bias"}  # it cancels in the margin of a pair
    assert all(torch.equal(p, frozen[name]) for name, p in bench.backbone.named_parameters())


def test_the_backbone_is_as_before_after_training(bench: Workbench, tmp_path: Path) -> None:
    hooks = [len(module._forward_hooks) for module in bench.backbone.modules()]
    train_tiny(bench, tmp_path)
    assert [len(module._forward_hooks) for module in bench.backbone.modules()] == hooks


def test_the_loss_falls_and_the_rule_is_learned_by_gradient_alone(bench: Workbench, tmp_path: Path) -> None:
    watch = Watch()
    trained = train_tiny(bench, tmp_path, callbacks=[watch], epochs=4)
    losses = watch.values("loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)  # heads at zero: every margin is 0
    assert sum(losses[-3:]) / 3 < 0.3
    assert all(expert.accuracy > 0.95 for expert in trained.values())


def test_random_labels_cannot_be_predicted(tmp_path: Path) -> None:
    splits = {name: with_random_labels(pairs) for name, pairs in planted_splits(num_test=80).items()}
    bench = tiny_bench(
        tiny_settings(tmp_path / "run", methods=["per_task"], phase1={"head_start": True}), splits
    )
    chosen, rejected = score_pairs(train_models(bench)["per_task"], bench.trunk, bench.test)
    assert (chosen.rewards != rejected.rewards).all()
    hits = (chosen.rewards > rejected.rewards).float().mean().item()
    assert 0.38 < hits < 0.62  # 3 standard errors of 160 fair coins


def test_a_model_of_flipped_labels_is_always_wrong__defect_3(tmp_path: Path) -> None:
    """The sign of the labels reaches the rewards: no place on the way confuses winner and loser."""
    splits = planted_splits()
    splits = {"train": flipped(splits["train"]), "validation": flipped(splits["validation"])} | {
        "test": splits["test"]
    }
    bench = tiny_bench(tiny_settings(tmp_path / "run", methods=["per_task"]), splits)
    chosen, rejected = score_pairs(train_models(bench)["per_task"], bench.trunk, bench.test)
    assert (chosen.rewards > rejected.rewards).float().mean() == 0.0


@pytest.mark.parametrize("head_start", [True, False])
def test_the_label_says_which_side_is_better(bench: Workbench, tmp_path: Path, head_start: bool) -> None:
    """Capability experts: label 0 means that the rejected side has more of it."""
    job, _ = task_jobs(bench)

    def turned(rows: list) -> list:  # type: ignore[type-arg]
        return [row._replace(chosen=row.rejected, rejected=row.chosen, label=0.0) for row in rows]

    both = ExpertJob("turned", turned(job.train), turned(job.validation))
    trained = train_tiny(bench, tmp_path, [job, both], epochs=4, head_start=head_start)
    assert trained[job.name].accuracy > 0.95
    assert trained["turned"].accuracy > 0.95
    flat = torch.nn.functional.cosine_similarity
    heads = [expert.state["head.weight"] for expert in trained.values()]
    assert flat(*heads, dim=0) > 0.9


def test_four_forward_passes_of_a_quarter_are_one_step__defect_7(bench: Workbench, tmp_path: Path) -> None:
    """With any weights, and where the last step is not full."""
    first, second = task_jobs(bench)
    rows = [row._replace(weight=0.25 + i % 4) for i, row in enumerate(first.train[:22])]
    jobs = [ExpertJob("a", rows, first.validation), ExpertJob("b", second.train[:9], second.validation)]
    one, four = Watch(), Watch()
    whole = train_tiny(bench, tmp_path / "1", jobs, callbacks=[one], learning_rate=1e-3, evaluations=1)
    parts = train_tiny(
        bench, tmp_path / "4", jobs, callbacks=[four], learning_rate=1e-3, evaluations=1, accumulation=4
    )
    start = tiny_experts(bench, 2).expert_state(0)
    assert one.steps == four.steps == 4
    assert one.values("loss") == pytest.approx(four.values("loss"), abs=1e-5)
    for name in whole:
        assert distance(whole[name].state, parts[name].state) < 2e-5
    assert distance(whole["a"].state, start) > 1e-3


def test_uneven_accumulation_is_refused(bench: Workbench, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="choose a multiple of 3"):
        train_tiny(bench, tmp_path, accumulation=3)


def test_steps_have_warm_up_decay_and_clipping__defect_7(bench: Workbench, tmp_path: Path) -> None:
    watch = Watch()
    train_tiny(bench, tmp_path, callbacks=[watch], epochs=2.5, warmup=0.25, max_grad_norm=1e-3)
    rates = watch.values("learning_rate")
    peak = rates.index(max(rates))
    assert 0 < peak < len(rates) - 1
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert min(watch.values("grad_norm")) > 1e-3  # before clipping
    assert max(watch.clipped) == pytest.approx(1e-3, rel=1e-2)
    assert watch.steps == math.ceil(2.5 * 64 / 8)


def test_training_mode_is_back_after_validation__defect_5(bench: Workbench, tmp_path: Path) -> None:
    """The release calls eval() at step 0 and never train() again."""
    watch = Watch()
    train_tiny(bench, tmp_path, callbacks=[watch], evaluations=8)
    assert watch.training_flags == [True] * 8


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_gradient_checkpointing_changes_nothing(tmp_path: Path, bench: Workbench, pooling: str) -> None:
    plain, again = (
        train_tiny(
            bench,
            tmp_path / str(flag),
            experts=tiny_experts(bench, 2, pooling=pooling),
            gradient_checkpointing=flag,
        )
        for flag in (False, True)
    )
    assert all(distance(plain[name].state, again[name].state) == 0 for name in plain)


def test_the_same_seed_gives_the_same_experts_and_another_does_not(bench: Workbench, tmp_path: Path) -> None:
    first, second, other = (
        train_tiny(bench, tmp_path / name, seed=seed, evaluations=1)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert all(distance(first[name].state, second[name].state) == 0 for name in first)
    assert all(distance(first[name].state, other[name].state) > 0 for name in first)


def test_the_best_state_of_every_expert_is_kept__defect_10(bench: Workbench, tmp_path: Path) -> None:
    """Not the last one: steps far too large make the accuracy jump."""
    splits = rows_by_task(bench, "train"), rows_by_task(bench, "validation")
    train, validation = ([row for rows in split.values() for row in rows] for split in splits)
    jobs = [ExpertJob("one", train[::2], validation), ExpertJob("two", train[1::2], validation)]
    watch = Watch()
    rates = {"learning_rate": 0.5, "head_learning_rate": 0.5}
    trained = train_tiny(bench, tmp_path, jobs, callbacks=[watch], epochs=2, evaluations=8, **rates)
    for job in jobs:
        seen = watch.values(f"eval_accuracy/{job.name}")
        assert len(seen) == 9  # before the first step, and eight
        assert trained[job.name].accuracy == max(seen)
        kept = tiny_experts(bench, 1)
        kept.load_expert(0, trained[job.name].state)
        assert accuracy_of(bench, kept, validation) == pytest.approx(max(seen))
    last = [watch.values(f"eval_accuracy/{job.name}")[-1] for job in jobs]
    assert any(value < trained[job.name].accuracy for job, value in zip(jobs, last, strict=True))


def accuracy_of(bench: Workbench, experts: Experts, rows: Sequence[PairRow]) -> float:
    experts.attach(bench.backbone)
    try:
        ((accuracy, _),) = validate(bench.backbone, experts, bench.trunk, [ExpertJob("any", [], rows)])
    finally:
        experts.detach()
    return accuracy


@pytest.mark.parametrize(("patience", "steps"), [(0, 8), (2, 2)])
def test_training_stops_when_no_expert_gains(
    bench: Workbench, tmp_path: Path, patience: int, steps: int
) -> None:
    watch = Watch()
    train_tiny(bench, tmp_path, callbacks=[watch], evaluations=8, patience=patience, **NO_GAIN)
    assert watch.steps == steps


def test_an_expert_without_validation_pairs_does_not_keep_the_others_training(
    bench: Workbench, tmp_path: Path
) -> None:
    known, job = task_jobs(bench)
    jobs = [known, ExpertJob("unknown", job.train, [])]
    watch = Watch()
    train_tiny(bench, tmp_path, jobs, callbacks=[watch], evaluations=8, patience=2, **NO_GAIN)
    assert watch.steps == 2


def test_without_any_validation_pair_training_goes_to_its_end(bench: Workbench, tmp_path: Path) -> None:
    jobs = [ExpertJob(job.name, job.train, []) for job in task_jobs(bench)]
    watch = Watch()
    experts = tiny_experts(bench, 2)
    trained = train_tiny(bench, tmp_path, jobs, experts=experts, callbacks=[watch], evaluations=8, patience=1)
    assert watch.steps == 8
    for expert, job in enumerate(jobs):
        assert trained[job.name].accuracy == 0.5
        assert distance(trained[job.name].state, experts.expert_state(expert)) == 0  # the last state


def test_no_epochs_keep_the_start(bench: Workbench, tmp_path: Path) -> None:
    trained = train_tiny(bench, tmp_path, epochs=0)
    start = tiny_experts(bench, 2)
    assert all(
        distance(expert.state, start.expert_state(i)) == 0 for i, expert in enumerate(trained.values())
    )


def test_an_expert_without_pairs_keeps_its_start(bench: Workbench, tmp_path: Path) -> None:
    job, _ = task_jobs(bench)
    trained = train_tiny(bench, tmp_path, [job, ExpertJob("none", [], [])], head_start=True)
    assert distance(trained["none"].state, tiny_experts(bench, 2).expert_state(1)) == 0
    assert trained[job.name].accuracy > 0.95


def test_a_head_starts_from_pairs_of_its_own_where_it_has_them(bench: Workbench, tmp_path: Path) -> None:
    job, other = task_jobs(bench)
    few = ExpertJob("few", job.train[:4], [], head_pairs=job.train)
    trained = train_tiny(bench, tmp_path, [few, job, other], epochs=0, head_start=True)
    heads = [expert.state["head.weight"] for expert in trained.values()]
    torch.testing.assert_close(heads[0], heads[1])
    assert not torch.allclose(heads[0], heads[2])


def test_a_capability_expert_starts_from_its_parent(bench: Workbench, tmp_path: Path) -> None:
    job, _ = task_jobs(bench)
    parent = train_tiny(bench, tmp_path / "1", [job])[job.name]
    child = ExpertJob("child", job.train, job.validation, parent.state)
    trained = train_tiny(bench, tmp_path / "2", [child, job], epochs=0)
    assert distance(trained["child"].state, parent.state) == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_body_of_either_dtype_learns_in_float32(tmp_path: Path, dtype: str) -> None:
    settings = tiny_settings(tmp_path / "run", methods=["per_task"], backbone={"dtype": dtype})
    bench = tiny_bench(settings)
    assert str(bench.backbone.dtype) == f"torch.{dtype}"
    model = train_models(bench)["per_task"]
    assert {p.dtype for p in model.experts.parameters()} == {torch.float32}
    chosen, rejected = score_pairs(model, bench.trunk, bench.test)
    assert chosen.rewards.dtype == torch.float32
    assert (chosen.rewards > rejected.rewards).float().mean() > 0.95


def test_what_report_to_names_hears_of_every_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []

    class Reporter(TrainerCallback):
        def on_log(
            self, args: object, state: object, control: object, logs: dict[str, float], **_: object
        ) -> None:
            heard.extend(logs)

    for module in (jobs_module, integration_utils):
        monkeypatch.setattr(module, "get_available_reporting_integrations", lambda: ["loudspeaker"])
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "loudspeaker", Reporter)
    settings = tiny_settings(tmp_path / "run", methods=["per_task"], phase1={"report_to": "loudspeaker"})
    train_models(tiny_bench(settings))
    assert {"loss", "eval_accuracy", "learning_rate"} <= set(heard)


def test_nothing_is_printed(bench: Workbench, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train_tiny(bench, tmp_path)
    assert capfd.readouterr().out == ""


def test_enormous_margins_give_a_finite_loss__defect_15(bench: Workbench, tmp_path: Path) -> None:
    """-log(sigmoid(d)) of the release is infinite below -89."""
    job, _ = task_jobs(bench)
    start = tiny_experts(bench, 1).expert_state(0)
    trained = train_tiny(bench, tmp_path / "right", [job], epochs=4)[job.name].state
    start = {**trained, "head.weight": -1e4 * trained["head.weight"]}
    watch = Watch()
    wrong = ExpertJob("wrong", job.train, [], start)
    after = train_tiny(bench, tmp_path / "wrong", [wrong], callbacks=[watch])
    assert watch.values("loss")[0] > 1000
    assert all(math.isfinite(value) for value in watch.values("loss") + watch.values("grad_norm"))
    assert all(tensor.isfinite().all() for tensor in after["wrong"].state.values())


def test_the_order_of_training_holds_every_pair_once_an_epoch(bench: Workbench) -> None:
    jobs = task_jobs(bench)
    items = [(e, row) for e, job in enumerate(jobs) for row in job.train[:19]]
    settings = TrainingSettings(epochs=2.5, batch_pairs=8)
    order = training_order(items, bench.trunk, settings, seed=0)
    counted = [item for item in order if item[1].weight]
    assert len(counted) == math.ceil(2.5 * 38)
    assert len(order) % 8 == 0
    assert order[: len(counted)] == counted  # what fills the last batch stands at its end
    times = [counted.count(item) for item in items]
    assert set(times) == {2, 3}
    assert order == training_order(items, bench.trunk, settings, seed=0)
    assert order != training_order(items, bench.trunk, settings, seed=1)


def test_batches_hold_texts_of_similar_length_in_every_epoch(tmp_path: Path) -> None:
    pairs = planted_pairs(1, split="train", tasks=["hot"])
    long = [
        type(pairs[0])(
            id=str(i),
            prompt=(type(pairs[0].prompt[0])("user", f"{i} " + "x" * i),),
            chosen=pairs[0].chosen,
            rejected=pairs[0].rejected,
            task="hot",
        )
        for i in range(1, 30)
    ]
    bench = tiny_bench(tiny_settings(tmp_path / "run"), {"train": long, "validation": pairs, "test": pairs})
    items = [(0, row) for row in bench.train.rows]
    order = training_order(items, bench.trunk, TrainingSettings(epochs=3, batch_pairs=4), seed=0)
    lengths = [bench.table.length(row.chosen) for _, row in order if row.weight]
    spread = [max(lengths[i : i + 4]) - min(lengths[i : i + 4]) for i in range(0, len(lengths) - 3, 4)]
    assert max(spread) <= 8  # of 29 lengths; a batch at random spans 18 on average


def test_a_cut_checkpoint_is_skipped(bench: Workbench, tmp_path: Path) -> None:
    whole = train_tiny(bench, tmp_path / "whole", evaluations=4)

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
            if state.global_step == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_tiny(bench, tmp_path / "cut", evaluations=4, callbacks=[Stop()])
    first, last = sorted((tmp_path / "cut").glob("checkpoint-*"))
    assert (first.name, last.name) == ("checkpoint-2", "checkpoint-4")
    (last / "trainer_state.json").unlink()  # written last
    weights = last / "experts.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    watch = Watch()
    resumed = train_tiny(bench, tmp_path / "cut", evaluations=4, callbacks=[watch])
    assert len(watch.training_flags) == 6  # from step 2 to step 8
    assert all(distance(whole[name].state, resumed[name].state) == 0 for name in whole)


@pytest.mark.parametrize("patience", [0, 1])
def test_a_training_that_had_ended_is_not_continued(bench: Workbench, tmp_path: Path, patience: int) -> None:
    """Killed between its last checkpoint and the step file; early stopping is remembered."""
    changes = {**NO_GAIN, "patience": patience, "evaluations": 4}
    whole = train_tiny(bench, tmp_path, **changes)
    watch = Watch()
    again = train_tiny(bench, tmp_path, callbacks=[watch], **changes)
    assert watch.training_flags == []
    assert all(distance(whole[name].state, again[name].state) == 0 for name in whole)
    state = json.loads((max(tmp_path.glob("checkpoint-*")) / "trainer_state.json").read_text())
    assert state["global_step"] == (2 if patience else 8)


def test_validation_counts_ties_one_half(bench: Workbench) -> None:
    head_at_zero = tiny_experts(bench, 1)
    assert accuracy_of(bench, head_at_zero, bench.validation.rows) == 0.5


def test_flipped_rows_score_the_complement(bench: Workbench, tmp_path: Path) -> None:
    trained = train_tiny(bench, tmp_path, epochs=0.5)
    for name, expert in trained.items():
        experts = tiny_experts(bench, 1)
        experts.load_expert(0, expert.state)
        rows = rows_by_task(bench, "validation")[name]
        turned = [row._replace(chosen=row.rejected, rejected=row.chosen) for row in rows]
        right, wrong = accuracy_of(bench, experts, rows), accuracy_of(bench, experts, turned)
        assert right > 0.5
        assert right + wrong == pytest.approx(1.0)
