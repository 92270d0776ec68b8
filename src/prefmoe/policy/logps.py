"""Log-probabilities of completions under a language model."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prefmoe.nn import pad_left
from prefmoe.policy.pairs import Text
from prefmoe.runs.progress import Progress, silent


@torch.no_grad()
def completion_logps(
    model: nn.Module,
    texts: Sequence[Text],
    *,
    batch_tokens: int = 4096,
    routing_mask: bool = False,
    watch: Callable[[Sequence[int]], None] | None = None,
    progress: Progress = silent,
    label: str = "log-probabilities",
) -> Tensor:
    """Log-probability of every completion given its prompt, summed over its tokens, nats.

    Texts are batched by length; what they share a batch with changes nothing but rounding.

    Args:
        model: A causal language model of transformers, or one with an adapter.
        texts: Prompts with completions.
        batch_tokens: Tokens of one forward pass, padding included.
        routing_mask: Tell a PMoL adapter which tokens are the completion's, for its records.
        watch: Called after every batch with the numbers of its texts.
        progress: Shows how far it is.
        label: What it is called there.

    Returns:
        (texts,), float32, on the CPU.
    """
    model.eval()
    logps = torch.zeros(len(texts))
    lengths = [len(text.prompt_ids) + len(text.completion_ids) for text in texts]
    order = sorted(range(len(texts)), key=lambda i: -lengths[i])
    with progress(label, sum(lengths)) as advance:
        while order:
            size = max(1, batch_tokens // lengths[order[0]])
            batch, order = order[:size], order[size:]
            logps[batch] = _batch_logps(model, [texts[i] for i in batch], routing_mask=routing_mask)
            if watch is not None:
                watch(batch)
            advance(sum(lengths[i] for i in batch))
    return logps


def _batch_logps(model: nn.Module, texts: Sequence[Text], *, routing_mask: bool) -> Tensor:
    device = next(model.parameters()).device
    rows = [torch.tensor(text.prompt_ids + text.completion_ids) for text in texts]
    input_ids, mask = (tensor.to(device) for tensor in pad_left(rows))
    # Padding on the left puts all completions at the end: only their logits are needed.
    kept = 1 + max(len(text.completion_ids) for text in texts)
    more: dict[str, Any] = {}
    if routing_mask:
        lengths = torch.tensor([len(text.completion_ids) for text in texts], device=device)
        positions = torch.arange(input_ids.shape[1], 0, -1, device=device)
        more["routing_mask"] = (positions <= lengths[:, None]).float()
    logits = model(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(dim=1) - 1).clamp_min(0),
        logits_to_keep=kept,
        use_cache=False,
        **more,
    ).logits
    sums = []
    for row, text in zip(logits, texts, strict=True):
        number = len(text.completion_ids)
        target = torch.tensor(text.completion_ids, device=device)
        sums.append(-F.cross_entropy(row[-number - 1 : -1].float(), target, reduction="sum"))
    return torch.stack(sums).cpu()
