"""Pooled states of many (text, expert) rows, and convex starts for heads."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefmoe.backbone.packing import pack_texts, packed_batches
from prefmoe.reward.convex import fit_by_cross_validation
from prefmoe.reward.experts import Experts
from prefmoe.reward.texts import PairRow
from prefmoe.reward.trunk import Batch, Trunk
from prefmoe.runs.progress import Progress, silent

Row = tuple[int, int]  # text, expert


def expert_batch(trunk: Trunk, rows: Sequence[Row]) -> Batch:
    """What the upper layers start from: texts under experts, sharing what begins alike under the same expert."""
    texts = list(dict.fromkeys(text for text, _ in rows))
    below = trunk.batch(texts)
    place = {text: i for i, text in enumerate(texts)}
    nodes = below.packing.nodes()
    packing = pack_texts(
        [nodes[place[text]] for text, _ in rows], hidden=trunk.hidden, owners=[expert for _, expert in rows]
    )
    starts = below.starts[[place[text] for text, _ in rows]]
    return Batch(below.trunk, packing, starts)


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
    texts = [trunk.table.texts[text] for text, _ in distinct]
    owners = [expert for _, expert in distinct]
    states = torch.empty(len(distinct), backbone.config.hidden_size)
    was_training = experts.training
    experts.eval()
    with progress(label, sum(len(text.input_ids) for text in texts)) as advance:
        for batch in packed_batches(texts, trunk.batch_tokens, hidden=trunk.hidden, owners=owners):
            inputs = expert_batch(trunk, [distinct[i] for i in batch])
            states[batch] = experts.states(backbone, *inputs).cpu()
            advance(sum(len(texts[i].input_ids) for i in batch))
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
