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


def mix(x, A, B, weights, *, alpha, rank):
    """The sum over experts of w_e alpha / rank * B[e] A[e] x for every token: one expert at a time."""
    added = []
    for token, shares in zip(x, weights, strict=True):
        total = [0.0] * len(B[0])
        for down, up, share in zip(A, B, shares, strict=True):
            one = matrix_vector(up, matrix_vector(down, token))
            total = [t + share * alpha / rank * value for t, value in zip(total, one, strict=True)]
        added.append(total)
    return added
