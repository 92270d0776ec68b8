"""Rewards of K = 5 experts: ours beside PEFT one adapter at a time, PEFT mixed batches, and K separate models.

    python benchmarks/scoring_speed.py --out benchmarks/results/scoring_speed.json

Two loads: real pairs, and best-of-16 with 400-token prompts and 80-token completions. Everybody gives the reward of
every expert for every text, from the same LoRA weights (random: they do not change the speed), with the same budget of
tokens for a forward pass and texts sorted by length. Before anything is timed the rewards are compared. Ratios are
medians over alternating repeats of the ratio within a repeat. The floor is DESIGN's: each prompt and each completion
once through the trunk and once per expert through the rest; a share of 1 means as many layer-tokens a second as the
bare backbone reaches on dense full batches. Memory is that of 5 tasks of K experts beside one plain reward model:
weights, and the most that is alive at one time while the texts are scored.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from harness.loads import floor_layer_tokens, made_up_texts, naive_layer_tokens, pairs_of_file
from harness.memory import peak_bytes, stored_bytes
from harness.models import add_model_options, backbone_of, bare_pass, expert_rewards, random_reward_model
from harness.peers import (
    as_peft_model,
    as_sequence_classifier,
    rewards_by_classifier,
    rewards_by_mixed_batch,
    rewards_by_set_adapter,
)
from harness.timing import against, alternating, device_at_hand, machine, median_ratio, medians, write_result
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from prefmoe.data.render import Encoded, Renderer
from prefmoe.hub import resolve_backbone

PEERS = ("set_adapter", "mixed_batch", "separate_models")
TARGETS = {"pairs": {"set_adapter": 2.5}, "best_of_16": {"set_adapter": 5.0}}
TARGET_SHARE = 0.7  # of the floor
NUM_TASKS, LARGEST_MEMORY = 5, 1.1  # of one plain reward model
# Of the spread of the rewards. Merging LoRA into bfloat16 weights rounds it away in part.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3}
NOTE = (
    "separate_models: one of the K equal-sized models is run and its time taken K times; what loading and keeping K "
    "models costs is not counted"
)


def main(argv: Sequence[str] | None = None) -> dict[str, object]:
    arguments = parse(argv)
    device = device_at_hand()
    backbone = backbone_of(arguments, device)
    ours = random_reward_model(
        backbone,
        experts=arguments.experts,
        split_layer=arguments.split_layer,
        target_modules=arguments.target_modules,
    )
    peers = (as_peft_model(ours, backbone), as_sequence_classifier(ours, backbone))
    result: dict[str, object] = {
        "what": "seconds, ratios to ours, share of the floor; median over alternating repeats",
        "note": NOTE,
        "machine": machine(),
        "dtype": str(backbone.dtype),
        "settings": {name: str(value) for name, value in vars(arguments).items()},
        "loads": {},
    }
    for name, texts in loads(arguments, backbone.config.vocab_size).items():
        few = sorted(texts, key=lambda text: len(text.input_ids))[:8]
        agreement = check_equal(works(ours, peers, few, arguments.batch_tokens), backbone.dtype)
        found = measure(arguments, backbone, works(ours, peers, texts, arguments.batch_tokens), texts)
        result["loads"][name] = report(name, arguments, found, texts, len(backbone.layers)) | {
            "largest_difference_of_rewards": agreement
        }
        write_result(result, arguments.out)  # a run that is stopped keeps the loads that it has measured
    result["memory"] = memory(arguments, backbone, peers[1])
    show(result["loads"], result["memory"])
    write_result(result, arguments.out)
    return result


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_options(parser, num_layers=16, split_layer=8)
    parser.add_argument("--experts", type=int, default=5)
    parser.add_argument("--target-modules", nargs="+", default=["q_proj", "k_proj", "v_proj", "o_proj"])
    parser.add_argument("--pairs-file", default="../shared/data/preferences/test.jsonl.gz")
    parser.add_argument("--pairs", type=int, default=16, help="drawn from the file; 0 leaves this load out")
    parser.add_argument("--prompts", type=int, default=1, help="of best-of-16; 0 leaves this load out")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens of a text of a pair")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


def loads(arguments: argparse.Namespace, vocabulary: int) -> dict[str, list[Encoded]]:
    found: dict[str, list[Encoded]] = {}
    prompt, completion = (40, 8) if arguments.smoke else (400, 80)
    sizes = {"prompt_tokens": prompt, "completion_tokens": completion, "vocabulary": vocabulary}
    if arguments.pairs and arguments.smoke:
        found["pairs"] = made_up_texts(arguments.pairs, 2, **sizes)
    elif arguments.pairs:
        tokenizer = AutoTokenizer.from_pretrained(resolve_backbone(arguments.model))
        renderer = Renderer(tokenizer, max_length=arguments.max_length)
        found["pairs"] = pairs_of_file(arguments.pairs_file, arguments.pairs, renderer=renderer)
    if arguments.prompts:
        found["best_of_16"] = made_up_texts(arguments.prompts, 16, **sizes)
    return found


def works(ours, peers, texts: Sequence[Encoded], batch_tokens: int) -> dict[str, Callable[[], torch.Tensor]]:
    """What gives the rewards of all experts, or of one separate model."""
    adapters, classifier = peers
    heads = ours.experts.head_weight
    return {
        "ours": partial(expert_rewards, ours, texts, batch_tokens),
        "set_adapter": partial(rewards_by_set_adapter, adapters, heads, texts, batch_tokens),
        "mixed_batch": partial(rewards_by_mixed_batch, adapters, heads, texts, batch_tokens),
        "separate_models": partial(rewards_by_classifier, classifier, texts, batch_tokens),
    }


def check_equal(rewards_of: dict[str, Callable[[], torch.Tensor]], dtype: torch.dtype) -> dict[str, float]:
    """Largest difference to ours as a share of the rewards' standard deviation; stops where it is too large."""
    mine = rewards_of["ours"]()
    differences = {}
    for name in PEERS:
        theirs = rewards_of[name]()
        same = mine[:, 0] if theirs.ndim == 1 else mine
        differences[name] = ((theirs - same).abs().max() / mine.std()).item()
    wrong = {name: value for name, value in differences.items() if not value <= TOLERANCE[dtype]}
    if wrong:
        raise SystemExit(
            f"rewards differ from ours by more than {TOLERANCE[dtype]}: {wrong}; nothing was timed"
        )
    return {name: float(f"{value:.2g}") for name, value in differences.items()}


def measure(arguments, backbone, rewards_of, texts: Sequence[Encoded]) -> dict[str, object]:
    """Times of everybody, and layer-tokens of the bare backbone's batch."""
    seq = round(statistics.mean(len(text.input_ids) for text in texts))
    bare, layer_tokens = bare_pass(backbone, seq, arguments.batch_tokens)
    times = alternating({**rewards_of, "bare": bare}, arguments.repeats)
    times["separate_models"] = [arguments.experts * value for value in times["separate_models"]]
    return {"times": times, "bare_layer_tokens": layer_tokens}


def report(name: str, arguments, found, texts: Sequence[Encoded], layers: int) -> dict[str, object]:
    times, experts = found["times"], arguments.experts
    floor = floor_layer_tokens(texts, layers=layers, split_layer=arguments.split_layer, experts=experts)
    naive = naive_layer_tokens(texts, layers=layers, experts=experts)
    share = statistics.median(
        (floor / ours) / (found["bare_layer_tokens"] / bare)
        for ours, bare in zip(times["ours"], times["bare"], strict=True)
    )
    ratios = {peer: median_ratio(times, peer, "ours") for peer in PEERS}
    targets = {
        f"{peer}_over_ours": against(ratios[peer], target) for peer, target in TARGETS[name].items()
    } | {"share_of_floor": against(share, TARGET_SHARE)}
    return {
        "targets": targets,
        "over_ours": {peer: round(ratio, 3) for peer, ratio in ratios.items()},
        "share_of_floor": round(share, 3),
        "naive_over_floor": round(naive / floor, 3),
        "seconds": medians(times),
        "bare_layer_tokens_per_second": round(found["bare_layer_tokens"] / statistics.median(times["bare"])),
        "texts": len(texts),
        "tokens": sum(len(text.input_ids) for text in texts),
        "floor_layer_tokens": floor,
        "times": {method: [round(value, 4) for value in values] for method, values in times.items()},
    }


def memory(arguments, backbone, classifier) -> dict[str, object]:
    """Bytes of 5 x K experts on one backbone beside those of one plain model, both with full batches."""
    texts = made_up_texts(
        1 + arguments.batch_tokens // 512,
        2,
        prompt_tokens=192,
        completion_tokens=64,
        vocabulary=backbone.config.vocab_size,
    )
    many = random_reward_model(
        backbone,
        experts=arguments.experts,
        tasks=NUM_TASKS,
        split_layer=arguments.split_layer,
        target_modules=arguments.target_modules,
    )
    works = {
        "ours": (many, partial(expert_rewards, many, texts, arguments.batch_tokens)),
        "plain": (classifier, partial(rewards_by_classifier, classifier, texts, arguments.batch_tokens)),
    }
    found = {
        name: {"weights": stored_bytes([model]), "peak_of_new_tensors": peak_bytes(work)}
        for name, (model, work) in works.items()
    }
    ratio = sum(found["ours"].values()) / sum(found["plain"].values())
    return {
        "over_plain": round(ratio, 3),
        "at_most": LARGEST_MEMORY,
        "reached": ratio <= LARGEST_MEMORY,
        "bytes": found,
    }


def show(loads: dict[str, dict], memory: dict) -> None:
    console = Console()
    table = Table("load", "texts", *PEERS, "floor", title="seconds as a multiple of ours; share of the floor")
    for name, found in loads.items():
        ratios = (f"{found['over_ours'][peer]:.2f}" for peer in PEERS)
        table.add_row(name, str(found["texts"]), *ratios, f"{found['share_of_floor']:.2f}")
    console.print(table)
    for name, found in loads.items():
        for target, value in found["targets"].items():
            said = "reached" if value["reached"] else "missed"
            console.print(f"{name}: {target} {value['value']:.2f}, target {value['target']}: {said}")
    console.print(f"memory: {memory['over_plain']:.3f} of one plain model, at most {LARGEST_MEMORY}")


if __name__ == "__main__":
    main()
