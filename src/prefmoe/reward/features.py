"""Pooled states of many (text, expert) rows, and convex starts for heads."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefmoe.reward.convex import fit_by_cross_validation
from prefmoe.reward.experts import Experts
from prefmoe.reward.texts import PairRow, token_budget_batches
from prefmoe.reward.trunk import Trunk
from prefmoe.runs.progress import Progress, silent

Row = tuple[int, int]  # text, expert


@torch.no_grad()
def pooled_states(
    backbone: PreTrainedModel,
    experts: Experts,
    trunk: Trunk,
    rows: Sequence[Row],
    *,
    label: str = "experts",
    progress: Progress = silent,
) -> Tensor:
    """States of texts under experts, without gradient.

    Args:
        backbone: The one that `experts` are attached to.
        experts: The experts.
        trunk: Gives the texts' states below the experts.
        rows: A text and an expert each; equal rows are computed once.
        label: What the progress bar says.
        progress: Shows how far it is.

    Returns:
        float32 on the CPU, shape (rows, hidden), in the order of `rows`.
    """
    distinct = list(dict.fromkeys(rows))
    lengths = [trunk.table.length(text) for text, _ in distinct]
    states = torch.empty(len(distinct), backbone.config.hidden_size)
    was_training = experts.training
    experts.eval()
    with progress(label, sum(lengths)) as advance:
        for batch in token_budget_batches(lengths, trunk.batch_tokens):
            texts, ids = zip(*(distinct[i] for i in batch), strict=True)
            inputs = trunk.batch(texts)
            expert_ids = torch.tensor(ids, device=inputs.trunk.device)
            states[batch] = experts.states(backbone, *inputs, expert_ids=expert_ids).cpu()
            advance(sum(lengths[i] for i in batch))
    experts.train(was_training)
    place = {row: i for i, row in enumerate(distinct)}
    return states[[place[row] for row in rows]]


def fit_head(chosen: Tensor, rejected: Tensor, pairs: Sequence[PairRow]) -> Tensor:
    """Weights (hidden,) of the linear head that explains pairs best.

    States are scaled to unit variance for the fit, so that the penalty means the same for every width and layer.

    Args:
        chosen: States of the chosen completions, shape (pairs, hidden).
        rejected: States of the others.
        pairs: Labels, weights and prompts, row for row.
    """
    scale = torch.cat([chosen, rejected]).std(0).clamp_min(1e-6)
    return fit_by_cross_validation((chosen - rejected) / scale, pairs) / scale
