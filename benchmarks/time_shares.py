"""What scoring and a training step spend their time on: shares by kind of operation, from torch's profiler.

    python benchmarks/time_shares.py --out benchmarks/results/time_shares.json

Shares of the operations' own time, which other work on the machine changes little; seconds are not reported.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from harness.loads import made_up_texts
from harness.models import add_model_options, backbone_of, expert_rewards, random_reward_model
from harness.timing import device_at_hand, machine, write_result
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from prefmoe.data.render import Encoded
from prefmoe.reward.batches import PairCollator
from prefmoe.reward.texts import PairRow, TextTable
from prefmoe.reward.trainer import PairModule
from prefmoe.reward.trunk import Trunk

# By how the name of an operation begins, the first that fits; what fits none is "other".
KINDS = {
    "products of the backbone": ("aten::mm", "aten::addmm"),
    "products of the experts": ("aten::bmm", "aten::baddbmm", "aten::_grouped_mm"),
    "attention": ("aten::_scaled_dot_product", "aten::_flash_attention", "aten::_softmax"),
    "copies and gathers": ("aten::copy_", "aten::index", "aten::cat", "aten::clone", "aten::fill_", "aten::zero_"),
    "norms, rotary positions, activations, sums": (
        "aten::mul", "aten::add", "aten::sub", "aten::neg", "aten::silu", "aten::pow", "aten::mean", "aten::rsqrt",
        "aten::sum", "aten::div", "aten::threshold",
    ),
    "optimizer": ("aten::_foreach", "aten::_fused_adam", "aten::lerp", "aten::addcdiv", "aten::addcmul", "aten::sqrt"),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> dict[str, object]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_options(parser, num_layers=16, split_layer=8)
    parser.add_argument("--experts", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=80)
    parser.add_argument("--completion-tokens", type=int, default=40)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    backbone = backbone_of(arguments, device_at_hand())
    scored, trained = (
        random_reward_model(backbone, experts=arguments.experts, split_layer=arguments.split_layer)
        for _ in range(2)
    )
    texts = made_up_texts(
        arguments.prompts,
        2,
        prompt_tokens=arguments.prompt_tokens,
        completion_tokens=arguments.completion_tokens,
        vocabulary=backbone.config.vocab_size,
    )
    works = {
        "scoring": lambda: expert_rewards(scored, texts, arguments.batch_tokens),
        "training step": training_step(trained, texts, arguments.batch_tokens),
    }
    result: dict[str, object] = {
        "what": "shares of the operations' own time, by kind",
        "machine": machine(),
        "dtype": str(backbone.dtype),
        "settings": {name: str(value) for name, value in vars(arguments).items()},
        "shares": {name: shares(work) for name, work in works.items()},
    }
    show(result["shares"])
    write_result(result, arguments.out)
    return result


def training_step(model, texts: Sequence[Encoded], batch_tokens: int) -> Callable[[], None]:
    """A step on cached trunk states, the first completion of a prompt chosen, experts in turn."""
    model.experts.store_in(torch.float32)
    model.experts.requires_grad_(True)
    module = PairModule(model.backbone, model.experts)
    optimizer = torch.optim.AdamW(model.experts.parameters(), lr=1e-5)
    table = TextTable()
    numbers = [table.add(text) for text in texts]
    pairs = [PairRow(*sides) for sides in zip(numbers[0::2], numbers[1::2], strict=True)]
    items = [(row % model.experts.num_experts, pair) for row, pair in enumerate(pairs)]
    trunk = Trunk(model.backbone, model.config.split_layer, table, batch_tokens=batch_tokens)
    batch = PairCollator(trunk)(items)
    inputs = {
        name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in batch.items()
    }

    def step() -> None:
        module(**inputs)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def shares(work: Callable[[], object]) -> dict[str, float]:
    """Share of every kind, largest first."""
    work()  # warm-up
    with profile(activities=[ProfilerActivity.CPU, *_cuda()]) as recorded:
        work()
    spent: Counter[str] = Counter()
    for event in recorded.key_averages():
        spent[_kind(event.key)] += event.self_device_time_total if _cuda() else event.self_cpu_time_total
    total = sum(spent.values())
    return {kind: round(time / total, 3) for kind, time in spent.most_common()}


def _cuda() -> list[ProfilerActivity]:
    return [ProfilerActivity.CUDA] if torch.cuda.is_available() else []


def _kind(name: str) -> str:
    fitting = (kind for kind, starts in KINDS.items() if name.startswith(starts))
    return next(fitting, "other")


def show(shares: dict[str, dict[str, float]]) -> None:
    table = Table("what", *shares)
    for kind in dict.fromkeys(kind for found in shares.values() for kind in found):
        table.add_row(kind, *(f"{found.get(kind, 0):.2f}" for found in shares.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
