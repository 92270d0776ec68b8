"""A DPO step (forward and backward) with shared prompts beside the same step as TRL does it, on real pairs.

    python benchmarks/dpo_step.py configs/policy-cpu.yaml --out benchmarks/results/dpo_step.json

Same model, same adapter, same batches, in turn; nothing is reported where losses differ. The reference's
log-probabilities are left out of both, as `prefmoe policy train` computes them once for all methods.
"""

import argparse
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from harness.timing import alternating, device_at_hand, machine, median_ratio, medians, write_result
from rich.console import Console
from rich.table import Table
from torch import Tensor
from trl import DPOConfig

from prefmoe import connect_preferences, share_prompts
from prefmoe.data.render import Renderer
from prefmoe.policy.bench import load_language_model, load_tokenizer
from prefmoe.policy.methods import is_pmol, lora_config, pmol_config, rank_of_lora
from prefmoe.policy.pairs import TokenPair, encode, read_splits
from prefmoe.policy.settings import PolicySettings, load_policy_settings
from prefmoe.policy.shared_prompts import language_model_of
from prefmoe.policy.train import TokenizedDPOTrainer


def main(argv: Sequence[str] | None = None) -> dict[str, object]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="of `prefmoe policy train`; its training pairs, model and batch size")
    parser.add_argument("--set", action="append", default=[], dest="changes", metavar="KEY=VALUE")
    parser.add_argument("--methods", nargs="+", default=["lora", "pmol"], choices=["lora", "pmol"])
    parser.add_argument("--repeats", type=int, default=5, help="each on its own batch")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    settings = load_policy_settings(arguments.config, arguments.changes)
    preferences, splits = read_splits(settings.data, seed=settings.seed)
    tokenizer = load_tokenizer(settings.model.name)
    renderer = Renderer(tokenizer, max_length=settings.model.max_length)
    rows = encode(splits["train"], renderer, allow_equal=True).rows
    random.Random(settings.seed).shuffle(rows)
    size = settings.training.batch_pairs
    rows = rows[: size * arguments.repeats]
    batches = [rows[i : i + size] for i in range(0, len(rows), size)]

    found = {}
    for method in arguments.methods:
        with tempfile.TemporaryDirectory() as folder:
            trainer = trainer_of(method, settings, preferences, tokenizer, rows, folder)
            found[method] = measure(trainer, batches)
    tokens = {
        "of_both_sides": sum(2 * len(r.prompt_ids) + len(r.chosen_ids) + len(r.rejected_ids) for r in rows),
        "prompts_once": sum(len(r.prompt_ids) + len(r.chosen_ids) + len(r.rejected_ids) for r in rows),
        "of_completions": sum(len(r.chosen_ids) + len(r.rejected_ids) for r in rows),
    }
    result: dict[str, object] = {"machine": machine(), "config": arguments.config, "set": arguments.changes}
    result |= {"pairs_a_step": size, "tokens": tokens, "methods": found}
    show(found)
    write_result(result, arguments.out)
    return result


def trainer_of(
    method: str,
    settings: PolicySettings,
    preferences: list[str],
    tokenizer: object,
    rows: Sequence[TokenPair],
    folder: str,
) -> TokenizedDPOTrainer:
    adapter = settings.adapter
    config = (
        pmol_config(method, adapter, preferences)
        if is_pmol(method)
        else lora_config(adapter, settings.training, rank=rank_of_lora(method, adapter, preferences))
    )
    trainer = TokenizedDPOTrainer(
        model=load_language_model(settings.model),
        args=DPOConfig(
            output_dir=folder,
            bf16=False,
            max_length=None,
            gradient_checkpointing=False,
            report_to="none",
            use_cpu=device_at_hand().type == "cpu",
        ),
        train_dataset=Dataset.from_list([columns(row) for row in rows]),
        processing_class=tokenizer,
        peft_config=config,
    )
    trainer.precompute_ref_logps = True
    return connect_preferences(trainer) if is_pmol(method) else trainer


def columns(row: TokenPair) -> dict[str, object]:
    return {
        "prompt_ids": list(row.prompt_ids),
        "chosen_ids": list(row.chosen_ids),
        "rejected_ids": list(row.rejected_ids),
        "ref_chosen_logps": 0.0,
        "ref_rejected_logps": 0.0,
        "preference": row.preference,
    }


def measure(trainer: TokenizedDPOTrainer, batches: Sequence[Sequence[TokenPair]]) -> dict[str, object]:
    """Ratio and seconds of a step; every repeat has its own batch, the first batch warms up."""
    language_model = language_model_of(trainer.model)
    plain = language_model.forward
    share_prompts(trainer)
    forwards = {"trl": plain, "shared": language_model.forward}
    trainer.model.train()
    losses: dict[str, list[float]] = {name: [] for name in forwards}

    def step(name: str) -> None:
        language_model.forward = forwards[name]
        rows = batches[max(0, len(losses[name]) - 1)]
        batch = trainer._prepare_inputs(trainer.data_collator([columns(row) for row in rows]))
        loss: Tensor = trainer.compute_loss(trainer.model, batch)
        trainer.accelerator.backward(loss)
        trainer.model.zero_grad()
        losses[name].append(loss.item())

    works = {name: (lambda name=name: step(name)) for name in forwards}
    alternating(works, 1)
    times = alternating(works, len(batches))
    difference = max(abs(a - b) for a, b in zip(losses["trl"], losses["shared"], strict=True))
    tolerance = 2e-2 if language_model.dtype == torch.bfloat16 else 1e-3
    if difference > tolerance * max(1.0, *map(abs, losses["trl"])):
        raise SystemExit(f"losses differ by {difference:.3g}; a time of another result means nothing")
    return {
        "trl_over_shared": round(median_ratio(times, "trl", "shared"), 3),
        "seconds": medians(times),
        "largest_difference_of_losses": difference,
    }


def show(found: dict[str, dict[str, object]]) -> None:
    table = Table(
        "method", title="A DPO step: TRL's time over that with shared prompts", title_justify="left"
    )
    for name in ("ratio", "TRL, seconds", "shared, seconds"):
        table.add_column(name, justify="right")
    for method, numbers in found.items():
        seconds = numbers["seconds"]
        assert isinstance(seconds, dict)
        table.add_row(
            method, f"{numbers['trl_over_shared']:.2f}", f"{seconds['trl']:.2f}", f"{seconds['shared']:.2f}"
        )
    Console().print(table)


if __name__ == "__main__":
    main()
