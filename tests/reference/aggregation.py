"""Slow twin of prefmoe.nn.aggregation: plain floats."""


def dot(left, right):
    return sum(a * b for a, b in zip(left, right, strict=True))


def mlp(states, parameters):
    """w2 . PReLU(W1 [z_0; ...; z_{k-1}] + b1) + b2 (Quan 2024, phase 3) for one text."""
    z = [value for state in states for value in state]
    layer = [
        dot(row, z) + b
        for row, b in zip(parameters["layers.0.weight"], parameters["layers.0.bias"], strict=True)
    ]
    (slope,) = parameters["layers.1.weight"]
    activated = [value if value > 0 else slope * value for value in layer]
    return dot(parameters["layers.2.weight"][0], activated) + parameters["layers.2.bias"][0]


def aggregate(kind, states, scores, parameters):
    """Reward of one text: states (experts, hidden), scores (experts,)."""
    if kind == "task_head":
        return scores[0]
    if kind == "linear_scores":
        return dot(parameters["weight"], scores)
    if kind == "linear_states":
        corrections = sum(dot(w, state) for w, state in zip(parameters["weight"], states, strict=True))
        return corrections + parameters["head"] * scores[0]
    return mlp(states, parameters)


def mean_reward(members):
    return [sum(text) / len(text) for text in zip(*members, strict=True)]


def worst_case(members):
    return [min(text) for text in zip(*members, strict=True)]


def uncertainty_weighted(members, penalty):
    rewards = []
    for text in zip(*members, strict=True):
        mean = sum(text) / len(text)
        variance = sum((reward - mean) ** 2 for reward in text) / len(text)
        rewards.append(mean - penalty * variance)
    return rewards
