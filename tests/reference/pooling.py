"""Slow twin of prefmoe.nn.pooling: lists and loops."""


def pack_left(rows, mask):
    packed = []
    for row, real in zip(rows, mask, strict=True):
        kept = [token for token, is_real in zip(row, real, strict=True) if is_real]
        rest = [token for token, is_real in zip(row, real, strict=True) if not is_real]
        packed.append(kept + rest)
    return packed, [sum(map(bool, real)) for real in mask]


def mean_tokens(rows, starts, ends):
    means = []
    for row, start, end in zip(rows, starts, ends, strict=True):
        span = row[start:end] if start < end else [row[end - 1]]
        means.append([sum(column) / len(span) for column in zip(*span, strict=True)])
    return means
