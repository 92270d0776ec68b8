"""Accuracy of TRL's RewardTrainer on the pairs that the experts of a run train on, beside the model of that run.

    python benchmarks/trl_accuracy.py runs/training-speed --folder runs/trl-accuracy \
        --out benchmarks/results/trl_accuracy.json

`trl_mix` is one reward model on all tasks' pairs, `trl_per_task` one a task, each judged on its own task's pairs: the
task is given to it, where ours has to find it. They train LoRA of our size on our layers for one epoch, in TRL's
default batch of 8; a run of the paper's split keeps pairs back for its aggregators, which TRL has no use for. The
learning rate is the one of `--rates` whose `trl_mix` ranks more validation pairs right (mean of the tasks); test pairs
are scored with that one alone. Prints a table, writes JSON; the same command goes on where it was stopped.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from harness.peers import classifier_lora, new_classifier, rewards_by_classifier, trl_trainer
from harness.timing import machine, write_result
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefmoe.backbone.layers import load_backbone
from prefmoe.cli.progress import StepProgress
from prefmoe.data.read import read_pairs
from prefmoe.data.render import Renderer
from prefmoe.data.split import split_by_prompt
from prefmoe.evaluation.accuracy import macro_accuracy, pair_hits
from prefmoe.evaluation.metrics import Metrics, build_metrics
from prefmoe.records import PreferencePair
from prefmoe.reward.evaluate import margins_by_task, prompts_by_task, score_pairs
from prefmoe.reward.score import RewardModel
from prefmoe.reward.settings import RewardSettings, load_settings
from prefmoe.reward.splits import draw_per_task, read_splits, with_task
from prefmoe.reward.texts import EncodedPairs, TextTable, encode_pairs
from prefmoe.reward.trunk import Trunk
from prefmoe.reward.workbench import tokenizer_of_backbone
from prefmoe.runs.precision import resolve_dtype
from prefmoe.runs.run import Run, process_state

BATCH_PAIRS = 8  # TRL's default
MIX, PER_TASK = "trl_mix", "trl_per_task"
PAD_TOKEN = "pad_token_id"  # by which a classifier finds the last token
Margins = dict[str, list[float]]  # by task


def main(argv: Sequence[str] | None = None) -> dict[str, object]:
    arguments = parse(argv)
    settings = load_settings(arguments.run / "config.yaml", out=arguments.folder)
    peer = Peer(settings, arguments.test, test_pairs_per_task=arguments.test_pairs_per_task)
    found = {rate: peer.margins(MIX, rate, "validation") for rate in arguments.rates}
    accuracies = {rate: accuracy(margins) for rate, margins in found.items()}
    best = max(accuracies, key=accuracies.__getitem__)
    test = {kind: peer.margins(kind, best, "test") for kind in (MIX, PER_TASK)}
    metrics = build_metrics(
        {"dmoerm": margins_of_ours(arguments.run / "dmoerm", peer), **test},
        prompt_ids=prompts_by_task(peer.splits["test"]),
        subject="dmoerm",
        seed=peer.settings.seed,
    )
    result: dict[str, object] = {
        "what": "accuracy on test pairs of TRL's RewardTrainer and of our run on the same pairs",
        "machine": machine(),
        "dtype": str(peer.backbone.dtype),
        "settings": {name: str(value) for name, value in vars(arguments).items()},
        "training_pairs": len(peer.splits["train"].rows),
        "learning_rate": best,
        "mix_on_validation_pairs": accuracies,
        "per_task_on_validation_pairs": accuracy(peer.margins(PER_TASK, best, "validation")),
        "test": metrics.model_dump(mode="json"),
    }
    show(metrics)
    write_result(result, arguments.out)
    return result


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="finished run folder with a `dmoerm` in it")
    parser.add_argument("--folder", type=Path, default=Path("runs/trl-accuracy"), help="of the peers")
    parser.add_argument("--test", type=Path, default=Path("../shared/data/preferences/test.jsonl.gz"))
    parser.add_argument("--test-pairs-per-task", type=int, help="drawn; all by default")
    # TRL's default, what its documentation advises for LoRA, and one above.
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 1e-3, 3e-3])
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


class Peer:
    """TRL on the pairs of a run, with every training a step of a run folder.

    Args:
        settings: Of our run, with another folder.
        test: File of test pairs.
        test_pairs_per_task: How many of them are drawn; None for all.
    """

    def __init__(
        self, settings: RewardSettings, test: Path, *, test_pairs_per_task: int | None = None
    ) -> None:
        body = settings.backbone
        self.settings, self.run, self.progress = settings, Run(settings), StepProgress()
        device = process_state().device
        self.backbone: PreTrainedModel = load_backbone(
            body.name,
            num_layers=body.num_layers,
            dtype=resolve_dtype(body.dtype, device),
            max_length=body.max_length,
        ).to(device)
        self.tokenizer: PreTrainedTokenizerBase = tokenizer_of_backbone(body.name)
        self.renderer, self.table = Renderer(self.tokenizer, max_length=body.max_length), TextTable()
        pairs = pairs_of_experts(settings) | {
            "test": draw_per_task(
                with_task(read_pairs(test, split="test"), "test"), test_pairs_per_task, settings.seed
            )
        }
        self.splits = {
            name: encode_pairs(rows, self.renderer, self.table, allow_equal=name != "train")
            for name, rows in pairs.items()
        }
        self.tasks = sorted({str(pair.task) for pair in self.splits["train"].pairs})

    def margins(self, kind: str, rate: float, split: str) -> Margins:
        """Reward margins of a split's pairs under `mix`, or each task's under the model of that task."""
        if kind == MIX:
            return self._of_model(MIX, self.splits["train"], rate, split, self.splits[split])
        return {
            task: self._of_model(task, of_task(self.splits["train"], task), rate, split, pairs)[task]
            for task in self.tasks
            if (pairs := of_task(self.splits[split], task)).rows
        }

    def _of_model(
        self, name: str, train: EncodedPairs, rate: float, split: str, pairs: EncodedPairs
    ) -> Margins:
        """Of one reward model, trained unless it has been."""
        step = f"{name}_{rate:g}"
        state = self.run.step(f"{step}.safetensors", lambda: self._train(train, rate), save, load_file)

        def compute() -> dict[str, Tensor]:
            sides = [self.table.texts[text] for row in pairs.rows for text in row[:2]]
            lora = classifier_lora(self.settings.experts, len(self.backbone.layers))
            model = get_peft_model(new_classifier(self.backbone), lora).eval()
            model.config.pad_token_id = int(state[PAD_TOKEN])
            unknown = set(model.load_state_dict(state, strict=False).unexpected_keys) - {PAD_TOKEN}
            if unknown:
                raise SystemExit(f"TRL's model is not what it was taken for: {sorted(unknown)}")
            with self.progress(f"{step} on {split} pairs", 1) as advance:
                rewards = rewards_by_classifier(model, sides, self.settings.backbone.batch_tokens)
                advance(1)
            return {"margins": rewards[0::2] - rewards[1::2]}

        found = self.run.step(f"{step}_{split}.safetensors", compute, save, load_file)["margins"]
        by_task: Margins = {}
        for pair, margin in zip(pairs.pairs, found.tolist(), strict=True):
            by_task.setdefault(str(pair.task), []).append(margin)
        return dict(sorted(by_task.items()))

    def _train(self, train: EncodedPairs, rate: float) -> dict[str, Tensor]:
        with TemporaryDirectory() as folder:
            trainer = self._trainer(train, rate, folder)
            with self.progress(f"TRL on {len(train.rows)} pairs, rate {rate:g}", 1) as advance:
                trainer.train()
                advance(1)
        model = trainer.accelerator.unwrap_model(trainer.model)
        trained = {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}
        return trained | {PAD_TOKEN: torch.tensor(model.config.pad_token_id)}

    def _trainer(self, train: EncodedPairs, rate: float, folder: str):
        torch.manual_seed(self.settings.seed)  # of the head
        texts = self.table.texts
        return trl_trainer(
            self.backbone,
            self.tokenizer,
            self.settings.experts,
            [(texts[row.chosen], texts[row.rejected]) for row in train.rows],
            folder,
            batch_pairs=BATCH_PAIRS,
            learning_rate=rate,
            seed=self.settings.seed,
        )


def pairs_of_experts(settings: RewardSettings) -> dict[str, list[PreferencePair]]:
    """Training pairs as a run draws them, less what it keeps back for good, and its validation pairs."""
    data, seed = settings.data, settings.seed
    splits = read_splits(data.model_copy(update={"capability_train": None}), seed)
    limits = {"train": data.max_pairs_per_task, "validation": data.max_validation_pairs_per_task}
    drawn = {
        name: draw_per_task(with_task(splits[name], name), limit, seed) for name, limit in limits.items()
    }
    if settings.phase3.split == "paper":
        fraction = settings.phase3.expert_fraction
        parts = split_by_prompt(drawn["train"], {"experts": fraction, "aggregator": 1 - fraction}, seed=seed)
        drawn["train"] = parts["experts"]
    return drawn


def of_task(encoded: EncodedPairs, task: str) -> EncodedPairs:
    kept = [i for i, pair in enumerate(encoded.pairs) if pair.task == task]
    return EncodedPairs([encoded.pairs[i] for i in kept], [encoded.rows[i] for i in kept])


def save(file: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file(dict(tensors), file)


def accuracy(margins: Margins) -> float:
    """Mean of the tasks."""
    return round(macro_accuracy({task: pair_hits(row) for task, row in margins.items()}), 4)


def margins_of_ours(folder: Path, peer: Peer) -> Margins:
    """Of our model, which routes by itself."""
    ours = RewardModel.load(folder)
    trunk = Trunk(
        ours.model.backbone, ours.model.config.split_layer, peer.table, batch_tokens=ours.batch_tokens
    )
    test = peer.splits["test"]
    return margins_by_task(test, *score_pairs(ours.model, trunk, test, progress=peer.progress))


def show(metrics: Metrics) -> None:
    tasks = list(metrics.methods["dmoerm"].tasks)
    table = Table("model", *tasks, "mean", "dmoerm minus it")
    for name, found in metrics.methods.items():
        gap = metrics.paired.get(f"dmoerm-{name}")
        said = "" if gap is None else f"{gap.macro:+.3f} ({gap.low:+.3f} to {gap.high:+.3f})"
        table.add_row(name, *(f"{found.tasks[t].accuracy:.3f}" for t in tasks), f"{found.macro:.3f}", said)
    Console().print(table)


if __name__ == "__main__":
    main()
