"""Slow twin of prefmoe.nn.packing and prefmoe.backbone.packing: sets of prefixes, and attention a text and a token at a time."""

import math


def prefixes(texts, owners):
    """Every distinct beginning of a text of an owner: the nodes of the tree."""
    return {
        (owner, tuple(text[: end + 1]))
        for text, owner in zip(texts, owners, strict=True)
        for end in range(len(text))
    }


def attention(queries, keys, values, scale):
    """Causal attention of one text and one head: lists of vectors."""
    results = []
    for place, query in enumerate(queries):
        logits = [scale * sum(a * b for a, b in zip(query, key, strict=True)) for key in keys[: place + 1]]
        largest = max(logits)
        weights = [math.exp(logit - largest) for logit in logits]
        results.append(
            [
                sum(weight * value[column] for weight, value in zip(weights, values, strict=False))
                / sum(weights)
                for column in range(len(values[0]))
            ]
        )
    return results


def saved_layer_tokens(shared, length, hidden):
    """Multiplications of a whole text less those of a text that takes its beginning, counted product by product."""
    token = 12 * hidden**2
    whole = length * token + sum((query + 0.5) * 2 * hidden for query in range(length))
    rest = (length - shared) * token + sum(length * 2 * hidden for _ in range(shared, length))
    return (whole - rest) / token
