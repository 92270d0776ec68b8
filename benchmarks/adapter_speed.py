"""PMoL beside PEFT's LoRA and a loop over experts: a training step, memory kept for backward, generation.

    python benchmarks/adapter_speed.py --model smollm2-135m --out benchmarks/results/adapter_speed.json

One process, one machine, methods in turn: PMoL with 12 experts of rank 8, one LoRA of rank 96 on the same layers (as
many trainable weights), and the same mixture as a loop over experts. The loop is that of LoRAMoE (peft/tuners/lora.py)
and of the "loramoe" adapter of MoE-PEFT (adapters/loramoe/model.py): all experts are computed one after the other, each
scaled by its weight and added. Its router is ours, so that nothing but the loop differs; theirs has one at every linear
layer. MixLoRA, in MoE-PEFT too, is sparse (each expert gets its own tokens) and not measured.
The headline is a ratio to LoRA, the median over repeats of the ratios within a repeat.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from harness.models import tiny_config
from harness.timing import at_most, machine, write_result
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

import prefmoe.policy.layer as layer_module
from prefmoe import PMoLConfig
from prefmoe.hub import resolve_backbone
from prefmoe.nn import LoraBank

GROUPS, RANK = {"helpful": 4, "harmless": 4, "warm": 4}, 8
EXPERTS = sum(GROUPS.values())
TARGETS = {
    "step_pmol_over_lora": 1.25,
    "step_pmol_over_loop": 0.5,
    "saved_pmol_over_lora": 1.25,
    "token_pmol_over_lora": 1.3,
}
SMOKE = {"model": "tiny", "dtype": "float32", "rows": 3, "seq": 16, "new_tokens": 2, "repeats": 1}


class LoopBank(LoraBank):
    """The bank with the experts one after the other, in the dtype of the experts as in MoE-PEFT."""

    def shrink(self, x: Tensor) -> Tensor:
        return x

    def shrink_beside(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        return x, F.linear(x, rows)

    def expand(self, low: Tensor, weights: Tensor) -> Tensor:
        added = torch.zeros((), dtype=low.dtype, device=low.device)
        x = low.to(self.A.dtype)
        for e in range(self.num_experts):
            one = F.linear(F.linear(x, self.A[e]), self.B[e]) * self.scale
            added = added + (weights[..., e : e + 1] * one).to(low.dtype)
        return added


def config_of(name: str):
    return tiny_config(2) if name == SMOKE["model"] else AutoConfig.from_pretrained(resolve_backbone(name))


def build(method: str, name: str, dtype: torch.dtype, device: str):
    torch.manual_seed(0)
    if name == SMOKE["model"]:
        model = AutoModelForCausalLM.from_config(config_of(name), dtype=dtype).to(device)
    else:
        model = AutoModelForCausalLM.from_pretrained(resolve_backbone(name), dtype=dtype).to(device)
    if method == "lora":
        config = LoraConfig(
            r=EXPERTS * RANK, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
        )
    else:
        config = PMoLConfig(groups=GROUPS, rank=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    layer_module.LoraBank = LoopBank if method == "loop" else LoraBank
    try:
        model = get_peft_model(model, config)
    finally:
        layer_module.LoraBank = LoraBank
    return model


def loss_of(model, batch: dict[str, Tensor]) -> Tensor:
    """Loss of a batch; a mixture is told preferences too, so that its group loss is part of what is measured."""
    preferences = {"preferences": torch.arange(len(batch["input_ids"])) % len(GROUPS)}
    is_lora = hasattr(next(iter(model.peft_config.values())), "lora_alpha")
    loss: Tensor = model(**batch, **({} if is_lora else preferences)).loss
    return loss


def step(model, batch: dict[str, Tensor]) -> None:
    loss_of(model, batch).backward()
    for parameter in model.parameters():
        parameter.grad = None


def saved_bytes(model, batch: dict[str, Tensor]) -> int:
    """Bytes of all tensors kept for the backward pass, each storage once, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model, batch)
    del loss
    return sum(storages.values())


def seconds(work: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def generate(model, ids: Tensor, tokens: int) -> None:
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
    )


def main(argv: Sequence[str] | None = None) -> dict[str, object]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument(
        "--rows", type=int, default=2, help="with 4 the loop over experts wants more than 24 GiB"
    )
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="a tiny random model: does it run at all")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        vars(arguments).update(SMOKE)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, arguments.dtype)
    vocabulary = config_of(arguments.model).vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (arguments.rows, arguments.seq), generator=generator).to(device)
    labels = ids.clone()
    labels[:, : arguments.seq // 2] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    methods = ["lora", "pmol", "loop"]
    models = {method: build(method, arguments.model, dtype, device) for method in methods}
    saved = {}
    for method, model in models.items():
        model.train()
        saved[method] = saved_bytes(model, batch)
        gc.collect()
    times: dict[str, dict[str, list[float]]] = {"step": {}, "token": {}}
    for repeat in range(arguments.repeats + 1):  # the first one warms up
        for method, model in models.items():
            model.train()
            step_time = seconds(partial(step, model, batch), device)
            model.eval()
            prompt = ids[:1, : arguments.seq // 2]
            token_time = seconds(partial(generate, model, prompt, arguments.new_tokens), device)
            if repeat:
                times["step"].setdefault(method, []).append(step_time)
                times["token"].setdefault(method, []).append(token_time / arguments.new_tokens)
    result = report(arguments, times, saved, models)
    write_result(result, arguments.out)
    return result


def report(arguments, times, saved, models) -> dict[str, object]:
    def ratio(kind: str, method: str, other: str) -> float:
        pairs = zip(times[kind][method], times[kind][other], strict=True)
        return statistics.median(a / b for a, b in pairs)

    ratios = {
        "step_pmol_over_lora": ratio("step", "pmol", "lora"),
        "step_pmol_over_loop": ratio("step", "pmol", "loop"),
        "saved_pmol_over_lora": saved["pmol"] / saved["lora"],
        "saved_loop_over_lora": saved["loop"] / saved["lora"],
        "token_pmol_over_lora": ratio("token", "pmol", "lora"),
        "token_loop_over_lora": ratio("token", "loop", "lora"),
    }
    seconds = {k: {m: round(statistics.median(v), 4) for m, v in by.items()} for k, by in times.items()}
    saved_mib = {m: round(b / 2**20, 3) for m, b in saved.items()}
    for name, value in ratios.items():
        print(f"{name:24} {value:6.3f}" + (f"   target at most {TARGETS[name]}" if name in TARGETS else ""))
    print(seconds, saved_mib)
    return {
        "what": "ratios; step and token: median over repeats, alternating; saved: bytes kept for backward",
        "machine": machine(),
        "settings": {k: str(v) for k, v in vars(arguments).items()},
        "trainable": {
            m: sum(p.numel() for p in model.parameters() if p.requires_grad) for m, model in models.items()
        },
        **{
            name: at_most(value, TARGETS[name]) if name in TARGETS else round(value, 3)
            for name, value in ratios.items()
        },
        "seconds": seconds,
        "saved_mib": saved_mib,
    }


if __name__ == "__main__":
    main()
