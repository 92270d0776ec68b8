"""Log-probabilities of completions under a language model."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prefmoe.backbone.packing import packed_batches
from prefmoe.data.render import Encoded
from prefmoe.nn import pad_left, scored_logprobs
from prefmoe.policy.pairs import Text
from prefmoe.policy.shared_prompts import (
    can_share,
    has_plain_head,
    language_model_of,
    pack_rows,
    pass_over_tree,
)
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

    Texts that share a prompt run it once, where the model's family allows it, else texts are batched by length; what
    they share a batch with changes nothing but rounding.

    Args:
        model: A causal language model of transformers, or one with an adapter.
        texts: Prompts with completions.
        batch_tokens: Tokens of one forward pass, padding included; what texts share counts once.
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
    shares = can_share(model, longest=max(lengths, default=0))
    batches = _tree_batches if shares else _padded_batches
    batch_logps = _tree_logps if shares else _padded_logps
    with progress(label, sum(lengths)) as advance:
        for batch in batches(model, texts, batch_tokens):
            logps[batch] = batch_logps(model, [texts[i] for i in batch], routing_mask=routing_mask)
            if watch is not None:
                watch(batch)
            advance(sum(lengths[i] for i in batch))
    return logps


def _padded_batches(_: nn.Module, texts: Sequence[Text], max_tokens: int) -> Iterator[list[int]]:
    lengths = [len(text.prompt_ids) + len(text.completion_ids) for text in texts]
    order = sorted(range(len(texts)), key=lambda i: -lengths[i])
    while order:
        size = max(1, max_tokens // lengths[order[0]])
        yield order[:size]
        order = order[size:]


def _tree_batches(model: nn.Module, texts: Sequence[Text], max_tokens: int) -> Iterator[list[int]]:
    rows = [Encoded(text.prompt_ids + text.completion_ids, len(text.prompt_ids), 0) for text in texts]
    return packed_batches(rows, max_tokens, hidden=language_model_of(model).config.hidden_size)


def _tree_logps(model: nn.Module, texts: Sequence[Text], *, routing_mask: bool) -> Tensor:
    device = next(model.parameters()).device
    ids = [text.prompt_ids + text.completion_ids for text in texts]
    spans = [(len(text.prompt_ids), len(row)) for text, row in zip(texts, ids, strict=True)]
    packing = pack_rows(model, ids)
    more: dict[str, Any] = {}
    if routing_mask:
        steps, ends = torch.arange(max(map(len, ids))), torch.tensor(spans)[:, :, None]
        more["routing_mask"] = ((steps >= ends[:, 0]) & (steps < ends[:, 1])).float().to(device)
    # The token before a completion's token predicts it.
    kept = torch.cat([packing.rows[i, a - 1 : b - 1] for i, (a, b) in enumerate(spans)])
    targets = torch.tensor([token for text in texts for token in text.completion_ids], device=device)
    own_head = has_plain_head(model)
    with pass_over_tree(model, packing, kept, with_head=not own_head):
        # What the ids are, only their shape counts: the model's hooks look at it.
        ids_of_rows = torch.zeros(packing.rows.shape, dtype=torch.long, device=device)
        found = model(input_ids=ids_of_rows, use_cache=False, **more)
    if own_head:
        weight = language_model_of(model).get_output_embeddings().weight
        of_tokens = scored_logprobs(found.last_hidden_state[0], weight, targets)
    else:  # a few tokens at a time: float32 logits of all of them take more memory than the rest of the pass
        of_tokens = torch.cat(
            [
                -F.cross_entropy(part.float(), target, reduction="none")
                for part, target in zip(found.logits[0].split(256), targets.split(256), strict=True)
            ]
        )
    sizes = [b - a for a, b in spans]
    return torch.stack([part.sum() for part in of_tokens.split(sizes)]).cpu()


def _padded_logps(model: nn.Module, texts: Sequence[Text], *, routing_mask: bool) -> Tensor:
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
