"""Slow twin of prefmoe.nn.dense_bank: one token at a time."""

from reference.lora_bank import matrix_vector


def select(x, weight, delta_ids):
    """weight[d] x for every token of every row, d the delta of the row."""
    return [
        [matrix_vector(weight[delta], token) for token in row]
        for row, delta in zip(x, delta_ids, strict=True)
    ]
