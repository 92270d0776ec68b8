"""Consistency on Contrast Instructions, counted one quadruple at a time."""


def consistency(own, other):
    count = 0.0
    for mine, theirs in zip(own, other, strict=True):
        if mine > theirs:
            count += 1.0
        elif mine == theirs:
            count += 0.5
    return count / len(own)
