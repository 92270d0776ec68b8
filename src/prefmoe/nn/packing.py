r"""Texts that begin alike, with what they share computed once.

A causal model gives a token the same state in every text that begins with the same tokens. So the texts of a batch
are the branches of a prefix tree, whose nodes stand in one row: no prompt twice, no padding. All that works token by
token (linear layers, norms, experts) sees every node once. Attention alone looks at texts: the nodes that a text adds
to the tree attend to that text from its first token on, and to no other.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from prefmoe.shapes import States


@dataclass(frozen=True)
class Packing:
    """Where the tokens of some texts stand in a prefix tree; built by `prefmoe.backbone.packing.pack_texts`.

    Attributes:
        tokens: What every node is, shape (nodes,): a token id, or the place of a state elsewhere.
        positions: Place of every node in its texts, from 0, shape (nodes,).
        rows: Nodes of every text in order, padded with 0, shape (batch, seq).
        lengths: Tokens of every text, shape (batch,).
        shared: How many of these, from the first on, another text brought into the tree, shape (batch,).
        spans: Owners and how many nodes each has, in the order of the nodes. Texts of two owners share nothing.
    """

    tokens: Int[Tensor, " nodes"]
    positions: Int[Tensor, " nodes"]
    rows: Int[Tensor, "batch seq"]
    lengths: Int[Tensor, " batch"]
    shared: Int[Tensor, " batch"]
    spans: tuple[tuple[int, int], ...]

    def nodes(self) -> list[list[int]]:
        """Nodes of every text, without padding."""
        return [row[:n] for row, n in zip(self.rows.tolist(), self.lengths.tolist(), strict=True)]

    def unpack(
        self, states: Float[Tensor, "nodes hidden"], starts: Int[Tensor, " batch"] | None = None
    ) -> States:
        """States of every text as a right-padded row; what stands behind a text's tokens means nothing.

        Args:
            states: States of the nodes.
            starts: First token of every text to be there, below its length; None takes whole texts.
        """
        rows = self.rows.to(states.device)
        if starts is not None:
            longest = int((self.lengths.to(starts.device) - starts).max())
            steps = starts[:, None] + torch.arange(longest, device=starts.device)
            rows = rows.gather(1, steps.clamp(max=rows.shape[1] - 1))
        return _take(states, rows)

    def copies(self, owners: Sequence[int]) -> "Packing":
        """The same tree once for every owner, one behind the other."""
        nodes, number = len(self.tokens), len(owners)
        offsets = nodes * torch.arange(number)[:, None, None]
        return replace(
            self,
            tokens=self.tokens.repeat(number),
            positions=self.positions.repeat(number),
            rows=(self.rows + offsets).flatten(0, 1),
            lengths=self.lengths.repeat(number),
            shared=self.shared.repeat(number),
            spans=tuple((owner, nodes) for owner in owners),
        )


class Block(NamedTuple):
    """Texts whose new nodes attend in one call.

    Attributes:
        queries: The nodes that every text added, padded with its last one.
        keys: All nodes of every text, padded.
        mask: Which keys a query may see; None for whole texts, where that is "itself and what is before".
        nodes: The nodes of `queries`, each once.
        places: Where these stand in the flattened `queries`.
    """

    queries: Int[Tensor, "texts new"]
    keys: Int[Tensor, "texts seq"]
    mask: Bool[Tensor, "texts 1 new seq"] | None
    nodes: Int[Tensor, " some"]
    places: Int[Tensor, " some"]


AttentionPlan = tuple[Block, ...]


def attention_plan(packing: Packing, device: torch.device | str = "cpu") -> AttentionPlan:
    """Blocks that together hold every node as a query once; those of one block differ in length by a factor of 2."""
    rows, lengths, shared = packing.rows, packing.lengths, packing.shared
    blocks = []
    for texts in _alike(shared.tolist(), (lengths - shared).tolist()):
        seq = int(lengths[texts].max())
        new = int((lengths - shared)[texts].max())
        steps = shared[texts, None] + torch.arange(new)
        queries = rows[texts].gather(1, steps.minimum(lengths[texts, None] - 1))
        mask = (torch.arange(seq) <= steps[..., None])[:, None] if shared[texts].any() else None
        places = (steps < lengths[texts, None]).flatten().nonzero().squeeze(1)
        nodes = queries.flatten()[places]
        keys, mask = rows[texts, :seq].to(device), None if mask is None else mask.to(device)
        blocks.append(Block(queries.to(device), keys, mask, nodes.to(device), places.to(device)))
    return tuple(blocks)


def packed_attention(
    query: Float[Tensor, "1 heads nodes dim"],
    key: Float[Tensor, "1 kv_heads nodes dim"],
    value: Float[Tensor, "1 kv_heads nodes dim"],
    plan: AttentionPlan,
    *,
    scale: float,
) -> Float[Tensor, "1 nodes heads dim"]:
    r"""Causal attention of every node inside its own text.

    $\mathrm{softmax}(s\, q_i K^\top) V$ over the nodes from the first of the text to $i$.

    Args:
        query: Queries of all nodes.
        key: Keys of all nodes; `heads` is a multiple of `kv_heads`.
        value: Their values.
        plan: Of the packing, on the same device.
        scale: $s$, usually one over the square root of `dim`.

    Source:
        Ours; the attention of a text is unchanged. Slow form: tests/reference/packing.py.
    """
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    result = torch.empty_like(q)  # every node is a query of one block
    for block in plan:
        attended = F.scaled_dot_product_attention(
            _take(q, block.queries).transpose(1, 2),
            _take(k, block.keys).transpose(1, 2),
            _take(v, block.keys).transpose(1, 2),
            attn_mask=block.mask,
            is_causal=block.mask is None,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        by_place = attended.transpose(1, 2).flatten(0, 1)
        result.index_copy_(0, block.nodes, _take(by_place, block.places))
    return result[None]


def saved_layer_tokens(shared: int, length: int, hidden: int) -> float:
    """What it saves if a text takes its first tokens from another one, in tokens through one layer.

    The tokens themselves are saved. But a rest attends through a mask, which computes all of its products, where
    whole texts compute the lower half of theirs. One costs 2 x hidden products of numbers, a token 12 x hidden^2.

    Args:
        shared: Tokens that are taken.
        length: All tokens of the text.
        hidden: Width of the layer.

    Example:
        >>> round(saved_layer_tokens(400, 480, hidden=576))
        422
        >>> saved_layer_tokens(20, 1000, hidden=576) < 0
        True
    """
    more_products = (length - shared) * length - length * length / 2
    return shared - more_products / (6 * hidden)


def _alike(shared: list[int], new: list[int]) -> Iterator[list[int]]:
    """Texts that added nodes, in groups: whole texts apart from rests, none below half the size of the largest."""
    group: list[int] = []
    for text in sorted((t for t, n in enumerate(new) if n), key=lambda t: (shared[t] > 0, -new[t])):
        if group and ((shared[text] > 0) != (shared[group[0]] > 0) or 2 * new[text] < new[group[0]]):
            yield group
            group = []
        group.append(text)
    if group:
        yield group


def _take(states: Tensor, index: Tensor) -> Tensor:
    """`states[index]`, by a kernel whose gradient sums what is taken twice in a fixed order."""
    return states.index_select(0, index.flatten()).view(*index.shape, *states.shape[1:])
