"""`prefmoe demo`: the main job on the simulated preference world, offline, in a few CPU minutes.

A tiny language model is trained on texts of the world first and then plays the backbone, so nothing is downloaded.
"""

import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from prefmoe.data.world import World, WorldCompletion
from prefmoe.data.write import writing
from prefmoe.evaluation.best_of_n import BestOfNCurve, curve
from prefmoe.evaluation.metrics import Metrics
from prefmoe.evaluation.pictures import best_of_n_curves as best_of_n_picture
from prefmoe.evaluation.report import build_report
from prefmoe.evaluation.run_folder import write_run_file
from prefmoe.records import PreferencePair
from prefmoe.reward.evaluate import evaluate_models
from prefmoe.reward.score import score_texts
from prefmoe.reward.settings import RewardSettings, check_settings
from prefmoe.reward.train import Models, train_models
from prefmoe.reward.workbench import Workbench, build_workbench
from prefmoe.runs.progress import Advance, Progress, silent
from prefmoe.runs.run import make_folder

WORLD = "the simulated world"  # what the demo's config names as its data
_WORDS = r"[a-z']+|[^\sa-z]"  # of lower-case text
_SPECIAL = ["<pad>", "</s>", "<unk>", "<user>", "<assistant>"]
_TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ ' </s>' }}{% else %}{{ ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


class DemoSize(NamedTuple):
    """How much the demo does."""

    pretraining_steps: int
    train_pairs: int  # of each task, as all that follow
    validation_pairs: int
    test_pairs: int
    best_of_n_prompts: int
    best_of_n: int


FULL = DemoSize(400, 400, 100, 300, 20, 32)
SHORT = DemoSize(150, 120, 40, 100, 8, 16)


class DemoResult(NamedTuple):
    """What the demo found, and where its best-of-n picture and its report lie."""

    metrics: Metrics
    picture: Path
    report: Path


def run_demo(out: Path, *, size: DemoSize = FULL, seed: int = 0, progress: Progress = silent) -> DemoResult:
    """Trains and compares a single reward model, one per task, and DMoERM; writes a run folder with a report."""
    world = World(seed)
    make_folder(out)
    start = time.perf_counter()
    backbone = out / "backbone"
    is_new = not backbone.exists()
    if is_new:
        pretrain_backbone(backbone, world, steps=size.pretraining_steps, seed=seed, progress=progress)
    pretraining = time.perf_counter() - start
    bench = build_workbench(demo_settings(out, seed=seed), pairs=world_pairs(world, size), progress=progress)
    if is_new:
        bench.run.add_seconds("backbone", pretraining)
    models = train_models(bench)
    completions = world.sample_completions(size.best_of_n_prompts, size.best_of_n, split="test")
    with bench.run.clock("best_of_n"):
        curves = best_of_n_curves(bench, models, completions, size.best_of_n)
    write_run_file(out / "best_of_n.json", curves)
    picture = out / "best_of_n.png"
    with writing(picture):
        picture.write_bytes(best_of_n_picture(curves).png)
    return DemoResult(evaluate_models(bench, models), picture, build_report(out))


def world_pairs(world: World, size: DemoSize) -> dict[str, list[PreferencePair]]:
    """Noisy training and validation pairs, clean test pairs."""
    return {
        "train": world.sample_pairs(size.train_pairs, split="train", label_noise=True),
        "validation": world.sample_pairs(size.validation_pairs, split="validation", label_noise=True),
        "test": world.sample_pairs(size.test_pairs, split="test", label_noise=False),
    }


def demo_settings(out: Path, *, seed: int) -> RewardSettings:
    """The config of the demo, as a user would write it."""
    training = {"epochs": 4, "learning_rate": 2e-3, "head_learning_rate": 2e-3, "evaluations": 4}
    content = {
        "data": {"train": WORLD},
        "backbone": {"name": str((out / "backbone").resolve()), "dtype": "float32", "max_length": 256},
        "experts": {"split_layer": 1, "rank": 8, "alpha": 16, "pooling": "mean"},
        "phase1": training,
        "phase2": training | {"epochs": 2, "evaluations": 2, "max_pairs_per_capability": 200},
        "phase3": {"split": "crossfit"},
        "methods": ["single", "per_task", "dmoerm"],
        "seed": seed,
        "out": str(out),
    }
    return check_settings(content, where="demo")


def best_of_n_curves(
    bench: Workbench, models: Models, completions: Sequence[WorldCompletion], num: int
) -> dict[str, BestOfNCurve]:
    """Gold reward of the best of n completions by every method's reward; `num` completions a prompt."""
    texts = [bench.table.add(bench.renderer.encode(row.prompt, row.completion)) for row in completions]
    gold = torch.tensor([row.gold for row in completions]).view(-1, num)
    ns = [2**power for power in range(num.bit_length()) if 2**power <= num]
    curves: dict[str, BestOfNCurve] = {}
    for method, model in models.items():
        label = f"best of {num}, {method}"
        scores = score_texts(model, bench.trunk, texts, label=label, progress=bench.progress)
        proxy = scores.rewards.view(-1, num)
        curves[method] = curve(proxy.numpy(), gold.numpy(), ns, seed=bench.settings.seed)
    return curves


def pretrain_backbone(
    folder: Path, world: World, *, steps: int, seed: int, progress: Progress = silent
) -> None:
    """A tiny Llama (4 layers, width 128), trained on texts of the world, with a word tokenizer.

    The folder appears when all of it is there, so a demo that was killed before begins here again.
    """
    staging = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(staging, ignore_errors=True)
    batch = 32
    texts = list(world.corpus(min(12000, steps * batch)))
    tokenizer = word_tokenizer(texts)
    torch.manual_seed(seed)
    model = _tiny_llama(tokenizer)

    def collate(rows: Sequence[str]) -> dict[str, torch.Tensor]:
        encoded = tokenizer(list(rows), padding=True, return_tensors="pt", return_token_type_ids=False)
        labels = encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, -100)
        return {**encoded, "labels": labels}

    arguments = TrainingArguments(
        output_dir=str(staging),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        weight_decay=0.01,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
    )
    with progress("tiny backbone", steps) as advance:
        rows = [_as_turns(text) for text in texts]
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=collate,
            callbacks=[_Steps(advance)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    with writing(staging):
        tokenizer.save_pretrained(staging)
        model.model.cpu().save_pretrained(staging)
        staging.replace(folder)


def _tiny_llama(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Untrained, from torch's seed."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def _as_turns(text: str) -> str:
    prompt, _, completion = text.partition("\n\n")
    return f"<user> {prompt} <assistant> {completion} </s>"


def word_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """One token a word or sign of the texts, lower case; with a chat template."""
    words = dict.fromkeys(word for text in texts for word in re.findall(_WORDS, text.lower()))
    vocabulary = {word: i for i, word in enumerate([*_SPECIAL, *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
        ]
    )
    backend.add_special_tokens(_SPECIAL)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
    )  # fmt: skip
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


class _Steps(TrainerCallback):
    def __init__(self, advance: Advance) -> None:
        self.advance = advance

    def on_step_end(self, *_: object, **__: object) -> None:
        self.advance(1)
