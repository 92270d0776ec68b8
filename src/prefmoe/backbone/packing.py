"""Batches of texts as prefix trees: which texts go together, and how they lie in one row."""

from collections.abc import Iterator, Sequence

import torch

from prefmoe.data.render import Encoded
from prefmoe.data.text import common_length
from prefmoe.nn import Packing, saved_layer_tokens

# Attention copies the keys and values of a shared prompt for every text: of the memory that a token takes in the MLP,
# about an eighth.
_COPIES_OF_A_TOKEN = 8


def pack_texts(
    texts: Sequence[Sequence[int]], *, hidden: int, owners: Sequence[int] | None = None
) -> Packing:
    """The prefix tree of some texts.

    A text takes its beginning from the one before it in sorted order, with which it shares most; unless that
    would cost more than it saves.

    Args:
        texts: Token ids of every text (or other numbers that stand for its states).
        hidden: Width of the backbone, for the costs.
        owners: Whose each text is, such as its expert; texts of different owners share nothing. None: all of one.
    """
    owners = owners or [0] * len(texts)
    tokens: list[int] = []
    positions: list[int] = []
    rows: list[list[int]] = [[]] * len(texts)
    shared = [0] * len(texts)
    sizes: dict[int, int] = {}
    before = None
    for text in sorted(range(len(texts)), key=lambda t: (owners[t], texts[t])):
        ids = texts[text]
        if before is not None and owners[before] == owners[text]:
            shared[text] = _worth_sharing(texts[before], ids, hidden)
        start = shared[text]
        rows[text] = (rows[before][:start] if before is not None else []) + list(
            range(len(tokens), len(tokens) + len(ids) - start)
        )
        tokens.extend(ids[start:])
        positions.extend(range(start, len(ids)))
        sizes[owners[text]] = sizes.get(owners[text], 0) + len(ids) - start
        before = text
    lengths = [len(ids) for ids in texts]
    padded = torch.zeros(len(texts), max(lengths), dtype=torch.long)
    for text, row in enumerate(rows):
        padded[text, : len(row)] = torch.tensor(row, dtype=torch.long)
    return Packing(
        tokens=torch.tensor(tokens, dtype=torch.long),
        positions=torch.tensor(positions, dtype=torch.long),
        rows=padded,
        lengths=torch.tensor(lengths),
        shared=torch.tensor(shared),
        spans=tuple(sizes.items()),
    )


def packed_batches(
    texts: Sequence[Encoded], max_tokens: int, *, hidden: int, owners: Sequence[int] | None = None
) -> Iterator[list[int]]:
    """Indices in batches that pack into at most `max_tokens` nodes (or hold one text).

    Texts of one prompt come together, and prompts with texts of similar length. The longest come first, so that a
    batch that does not fit into memory fails at once.

    Args:
        texts: What to batch.
        max_tokens: Nodes of one batch.
        hidden: Width of the backbone.
        owners: As in `pack_texts`.
    """
    owners = owners or [0] * len(texts)
    prompts = [text.input_ids[: text.prompt_length] for text in texts]
    longest: dict[tuple[int, ...], int] = {}
    for prompt, text in zip(prompts, texts, strict=True):
        longest[prompt] = max(longest.get(prompt, 0), len(text.input_ids))
    batch: list[int] = []
    nodes = copied = 0
    for index in sorted(
        range(len(texts)), key=lambda i: (-longest[prompts[i]], prompts[i], owners[i], texts[i].input_ids)
    ):
        ids = texts[index].input_ids
        new = len(ids)
        if batch and owners[batch[-1]] == owners[index]:
            new -= _worth_sharing(texts[batch[-1]].input_ids, ids, hidden)
        if batch and memory_in_tokens(nodes + new, copied + len(ids)) > max_tokens:
            yield batch
            batch, nodes, copied, new = [], 0, 0, len(ids)
        batch.append(index)
        nodes, copied = nodes + new, copied + len(ids)
    if batch:
        yield batch


def memory_in_tokens(nodes: int, copied: int) -> int:
    """What a batch takes: its nodes, or where many texts share a long prompt, the copies of its keys.

    Args:
        nodes: Tokens, what is shared counted once.
        copied: Tokens, what is shared counted for every text.
    """
    return max(nodes, copied // _COPIES_OF_A_TOKEN)


def _worth_sharing(before: Sequence[int], text: Sequence[int], hidden: int) -> int:
    """How many tokens a text takes from the one before it."""
    shared = common_length(before, text)
    return shared if saved_layer_tokens(shared, len(text), hidden) > 0 else 0
