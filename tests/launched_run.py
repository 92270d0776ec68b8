"""A tiny run as a script: `accelerate launch --multi_gpu --num_processes 2 launched_run.py OUT`."""

import sys
from pathlib import Path

import torch

from prefmoe.reward.evaluate import evaluate_models
from prefmoe.reward.settings import RewardSettings
from prefmoe.reward.train import train_models
from tiny_run import planted_splits, tiny_bench, tiny_settings


def launched_settings(out: Path) -> RewardSettings:
    """A last step that is not full, more than one pass over the pairs, accumulation."""
    training = {"learning_rate": 1e-3, "head_learning_rate": 1e-3, "epochs": 1.5, "accumulation": 2}
    return tiny_settings(out, methods=["single", "dmoerm"], phase1=training, phase2=training)


def main(out: Path) -> None:
    """Trains and, as the command line does, measures in the main process only."""
    torch.set_num_threads(1)
    bench = tiny_bench(launched_settings(out), planted_splits(num_train=23))
    models = train_models(bench)
    if bench.run.is_main:
        evaluate_models(bench, models)
    state = bench.run.state
    sys.stdout.write(f"process {state.process_index} of {state.num_processes}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
