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


def pad_left(rows):
    """Zeros in front of rows of ids, as many as the longest row has more; and a mask of what is no padding."""
    longest = max(len(row) for row in rows)
    missing = [longest - len(row) for row in rows]
    ids = [[0] * number + row for number, row in zip(missing, rows, strict=True)]
    mask = [[0] * number + [1] * len(row) for number, row in zip(missing, rows, strict=True)]
    return ids, mask
