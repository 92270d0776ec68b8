"""Slow twin of prefmoe.nn.routing: plain floats."""

import math


def task_logits(features, mean, std, weight, bias):
    rows = []
    for feature in features:
        standard = [(f - m) / s for f, m, s in zip(feature, mean, std, strict=True)]
        rows.append(
            [
                b + sum(w * x for w, x in zip(row, standard, strict=True))
                for row, b in zip(weight, bias, strict=True)
            ]
        )
    return rows


def router_features(states, prompt_length):
    """Mean state of the prompt, then mean state of its last 32 tokens, one list."""
    prompt = states[:prompt_length]
    return [sum(column) / len(part) for part in (prompt, prompt[-32:]) for column in zip(*part, strict=True)]


def softmax(logits):
    powers = [math.exp(logit - max(logits)) for logit in logits]
    return [power / sum(powers) for power in powers]


def route(logits, mode, given=None):
    """(task_ids, probs, weights), one text after the other."""
    task_ids, probs, weights = [], [], []
    for row, text in enumerate(logits):
        task = text.index(max(text)) if given is None else given[row]
        task_ids.append(task)
        probs.append(softmax(text))
        one_hot = [1.0 if index == task else 0.0 for index in range(len(text))]
        weights.append(probs[-1] if mode == "soft" else one_hot)
    return task_ids, probs, weights
