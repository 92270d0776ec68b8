"""Answers of a language model to many prompts."""

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefmoe.nn import pad_left
from prefmoe.runs.progress import Progress, silent


@torch.no_grad()
def sample_answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch_rows: int = 16,
    progress: Progress = silent,
    label: str = "answers",
) -> list[str]:
    """One answer a prompt; prompts of like length are answered together.

    Args:
        model: A causal language model, or one with an adapter.
        tokenizer: Its own.
        prompts: Token ids, up to where the answer begins.
        max_new_tokens: Longest answer.
        temperature: Of sampling; 0 takes the likeliest token.
        seed: Of sampling. The same seed and prompts, in batches of the same size, give the same answers.
        batch_rows: Prompts of one batch.
        progress: Shows how far it is.
        label: What it is called there.

    Returns:
        Texts without special tokens, in the order of the prompts.
    """
    model.eval()
    device = model.device
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    )
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    torch.manual_seed(seed)
    with progress(label, len(prompts)) as advance:
        for first in range(0, len(order), batch_rows):
            batch = order[first : first + batch_rows]
            ids, mask = pad_left([torch.tensor(prompts[i]) for i in batch])
            made = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
                **sampling,
            )
            for row, i in zip(made[:, ids.shape[1] :], batch, strict=True):
                answers[i] = str(tokenizer.decode(row, skip_special_tokens=True))
            advance(len(batch))
    return answers
