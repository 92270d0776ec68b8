"""Slow twin of prefmoe.nn.lora_bank: one token at a time (Hu et al. 2021, section 4.1)."""


def matrix_vector(matrix, vector):
    return [sum(m * v for m, v in zip(row, vector, strict=True)) for row in matrix]


def select(x, A, B, expert_ids, *, alpha, rank):
    """alpha / rank * B[e] A[e] x for every token of every row, e the expert of the row."""
    added = []
    for row, expert in zip(x, expert_ids, strict=True):
        tokens = [matrix_vector(B[expert], matrix_vector(A[expert], token)) for token in row]
        added.append([[alpha / rank * value for value in token] for token in tokens])
    return added
