"""Training the policies of a run by TRL's DPO trainer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import DPOConfig, DPOTrainer

from prefmoe.policy.bench import PolicyBench
from prefmoe.policy.costs import CostCallback
from prefmoe.policy.methods import is_pmol, lora_config, pmol_config, rank_of_lora
from prefmoe.policy.pairs import TokenPairs
from prefmoe.policy.router_start import fit_router_starts, start_routers
from prefmoe.policy.shared_prompts import share_prompts
from prefmoe.policy.trainers import connect_preferences
from prefmoe.runs.run import LogCallback, writing_checkpoint

AVERAGE = "average"  # name of the adapter that averages others


def train_policies(bench: PolicyBench) -> dict[str, Path]:
    """Trains every method of the settings; returns the folder of each adapter, ready for `PeftModel`.

    Each method is a step of the run: the same call goes on where it was stopped, inside a training from its newest
    checkpoint.
    """
    return {method: _train_method(bench, method) for method in bench.settings.methods}


def load_policy(bench: PolicyBench, folder: Path) -> PeftModel:
    """The language model with a trained adapter, in evaluation mode."""
    return PeftModel.from_pretrained(bench.new_model(), folder).eval()


def _train_method(bench: PolicyBench, method: str) -> Path:
    folder = bench.run.folder / method
    if method in ("lora_average", "emr"):
        return _merge(bench, method, _train_by_preference(bench), folder)
    config = _config(bench, method)
    if method == "sequential":
        state = _train_in_sequence(bench, config)
    else:
        state = _trained_state(bench, method, config, bench.splits["train"])
    model = get_peft_model(bench.new_model(), config)
    return _save_adapter(bench, model, state, folder)


def _config(bench: PolicyBench, method: str) -> PeftConfig:
    adapter = bench.settings.adapter
    if is_pmol(method):
        return pmol_config(method, adapter, bench.preferences)
    rank = rank_of_lora(method, adapter, bench.preferences)
    return lora_config(adapter, bench.settings.training, rank=rank)


def _train_in_sequence(bench: PolicyBench, config: PeftConfig) -> dict[str, Tensor]:
    """One LoRA that learns preference after preference; the reference stays the model without adapter."""
    state: dict[str, Tensor] | None = None
    for name in bench.preferences:
        state = _trained_state(bench, f"sequential_{name}", config, _pairs_of(bench, name), start=state)
    assert state is not None
    return state


def _train_by_preference(bench: PolicyBench) -> PeftModel:
    """A model with one LoRA a preference, each trained on its own pairs, named as its preference."""
    model: PeftModel | None = None
    config = _config(bench, "lora_average")
    for name in bench.preferences:
        state = _trained_state(bench, f"lora_{name}", config, _pairs_of(bench, name))
        if model is None:
            model = get_peft_model(bench.new_model(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        set_peft_model_state_dict(model, state, adapter_name=name)
    assert model is not None
    return model


def _pairs_of(bench: PolicyBench, preference: str) -> TokenPairs:
    return TokenPairs([row for row in bench.splits["train"].rows if row.preference == preference])


def _merge(bench: PolicyBench, method: str, model: PeftModel, folder: Path) -> Path:
    """Saves LoRAs of single preferences: their mean, exactly (by concatenation), or all, for `prefmoe.policy.emr`."""
    adapters = bench.preferences
    if method == "lora_average":
        share = [1 / len(adapters)] * len(adapters)
        model.add_weighted_adapter(adapters, share, AVERAGE, combination_type="cat")
        model.set_adapter(AVERAGE)
        adapters = [AVERAGE]
    if bench.run.is_main:
        model.save_pretrained(folder, selected_adapters=adapters)
        bench.tokenizer.save_pretrained(folder)
    return folder / AVERAGE if method == "lora_average" else folder


def _save_adapter(bench: PolicyBench, model: PeftModel, state: dict[str, Tensor], folder: Path) -> Path:
    set_peft_model_state_dict(model, state)
    if bench.run.is_main:
        model.save_pretrained(folder)
        bench.tokenizer.save_pretrained(folder)
    bench.run.wait()
    return folder


def _trained_state(
    bench: PolicyBench,
    name: str,
    config: PeftConfig,
    pairs: TokenPairs,
    *,
    start: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Tensors of a trained adapter, as a step of the run; `start` are those that it goes on from."""

    def compute() -> dict[str, Tensor]:
        torch.manual_seed(bench.settings.seed)
        return _train(bench, name, config, pairs, start=start)

    def save(file: Path, state: dict[str, Tensor]) -> None:
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, file)

    return bench.run.step(f"{name}.safetensors", compute, save, load_file, together=True)


class TokenizedDPOTrainer(DPOTrainer):
    """TRL's trainer on pairs that `Renderer` has rendered, which keeps the completion where TRL would cut it."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with writing_checkpoint(Path(self.args.output_dir)):
            super()._save_checkpoint(model, trial)

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset


def _train(
    bench: PolicyBench,
    name: str,
    config: PeftConfig,
    pairs: TokenPairs,
    *,
    start: dict[str, Tensor] | None,
) -> dict[str, Tensor]:
    folder = bench.run.folder / "checkpoints" / name
    validation = bench.splits["validation"]
    settings = bench.settings.training
    trainer = TokenizedDPOTrainer(
        model=bench.new_model(),
        args=_arguments(bench, folder, config, num_pairs=len(pairs.rows)),
        train_dataset=_dataset(bench, "train", pairs),
        eval_dataset=_dataset(bench, "validation", validation) if validation.rows else None,
        processing_class=bench.tokenizer,
        peft_config=config,
    )
    trainer.remove_callback(PrinterCallback)  # stdout is for results
    trainer.precompute_ref_logps = True  # they are columns of the data: computed once for all methods
    if is_pmol(name):
        connect_preferences(trainer)
        _start_routers(bench, trainer.accelerator.unwrap_model(trainer.model))
    share_prompts(trainer)
    if start is not None:
        set_peft_model_state_dict(trainer.accelerator.unwrap_model(trainer.model), start)
    steps = max(1, round(settings.epochs * len(pairs.rows) / settings.batch_pairs))
    with bench.progress(f"training {name}", steps) as advance:
        trainer.add_callback(LogCallback(bench.run, name, advance))
        trainer.add_callback(CostCallback(bench.run, name))
        checkpoint = get_last_checkpoint(str(folder)) if folder.exists() else None
        trainer.train(resume_from_checkpoint=checkpoint)
    return get_peft_model_state_dict(trainer.accelerator.unwrap_model(trainer.model))


def _start_routers(bench: PolicyBench, model: PeftModel) -> None:
    """Where the settings say so; one fit serves all methods, whose routers see the same before the first step."""
    config = model.peft_config[model.active_adapter]
    has_goal = config.group_loss != "none" and len(bench.preferences) > 1
    if bench.settings.training.router_start != "probe" or config.router != "linear" or not has_goal:
        return

    def compute() -> Mapping[str, Tensor]:
        pairs = bench.splits["train"]
        return fit_router_starts(
            model,
            pairs.one_side(),  # a prompt's other completion says little more of its preference
            [row.preference for row in pairs.rows],
            batch_tokens=bench.settings.model.batch_tokens,
            progress=bench.progress,
        )

    def save(file: Path, starts: Mapping[str, Tensor]) -> None:
        save_file(dict(starts), file)

    start_routers(model, bench.run.step("router_starts.safetensors", compute, save, load_file))


def _arguments(bench: PolicyBench, folder: Path, config: PeftConfig, *, num_pairs: int) -> DPOConfig:
    settings = bench.settings.training
    is_lora = str(config.peft_type) == "LORA" or getattr(config.peft_type, "value", "") == "LORA"
    rate = settings.lora_learning_rate if is_lora and settings.lora_learning_rate else settings.learning_rate
    steps = max(1, round(settings.epochs * num_pairs / settings.batch_pairs))
    validates = bool(settings.evaluations and bench.splits["validation"].rows)
    return DPOConfig(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=max(1, settings.batch_pairs // settings.accumulation),
        per_device_eval_batch_size=max(1, settings.batch_pairs // settings.accumulation),
        gradient_accumulation_steps=settings.accumulation,
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        learning_rate=rate,
        lr_scheduler_type="linear",
        warmup_steps=round(settings.warmup * steps),
        max_grad_norm=settings.max_grad_norm,
        beta=settings.beta,
        max_length=None,  # pairs are cut already
        eval_strategy="steps" if validates else "no",
        eval_steps=max(1, steps // max(1, settings.evaluations)),
        save_strategy="steps",
        save_steps=max(1, steps // 5),
        save_total_limit=2,
        logging_steps=max(1, steps // 25),
        bf16=False,  # the model has its own dtype; what is trained stays in float32
        report_to=settings.report_to,
        seed=bench.settings.seed,
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
    )


def _dataset(bench: PolicyBench, split: str, pairs: TokenPairs) -> Dataset:
    """Rows as TRL's collator takes them, with the reference's log-probabilities."""
    chosen, rejected = _reference_of(bench, split, pairs)
    return Dataset.from_list(
        [
            {
                "prompt_ids": list(row.prompt_ids),
                "chosen_ids": list(row.chosen_ids),
                "rejected_ids": list(row.rejected_ids),
                "ref_chosen_logps": c,
                "ref_rejected_logps": r,
                "preference": row.preference,
            }
            for row, c, r in zip(pairs.rows, chosen, rejected, strict=True)
        ]
    )


def _reference_of(
    bench: PolicyBench, split: str, pairs: TokenPairs
) -> tuple[Sequence[float], Sequence[float]]:
    chosen, rejected = bench.reference[split].chunk(2)
    place = {row: index for index, row in enumerate(bench.splits[split].rows)}
    indices = [place[row] for row in pairs.rows]
    return chosen[indices].tolist(), rejected[indices].tolist()
