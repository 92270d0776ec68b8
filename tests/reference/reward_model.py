"""Slow twin of the whole reward model: one text and one expert at a time, each a plain backbone of its own.

An expert's weights are merged into a copy of the backbone, which then runs as transformers runs it. Everything after
the pooled state is plain floats.
"""

import copy

import torch

from reference.aggregation import aggregate, dot
from reference.routing import router_features, softmax, task_logits


def merged(backbone, experts, expert):
    """A copy of the plain backbone with what one expert adds written into its weights."""
    changed = copy.deepcopy(backbone)
    for site, bank in experts.sites.items():
        weight = changed.get_submodule(site.replace("/", ".")).weight.data
        weight += bank.delta_weight(expert)
        if site in experts.dense:
            weight += experts.dense[site].weight[experts.dense_ids[expert]]
    return changed


def states_of(backbone, tokens):
    """States of the tokens of one text, as transformers computes them."""
    with torch.no_grad():
        return backbone(torch.tensor([tokens])).last_hidden_state[0]


def pool(states, start, pooling):
    if pooling == "last" or start >= len(states):
        return states[-1].tolist()
    span = states[start:].tolist()
    return [sum(column) / len(span) for column in zip(*span, strict=True)]


def task_probs(model, backbone, tokens, prompt_length):
    """The router reads the states of the prompt below the layers with experts."""
    with torch.no_grad():
        hidden = backbone(torch.tensor([tokens]), output_hidden_states=True).hidden_states
    features = router_features(hidden[model.config.split_layer][0].tolist(), prompt_length)
    router = {name: tensor.tolist() for name, tensor in model.router.state_dict().items()}
    return softmax(task_logits([features], **router)[0])


def task_reward(model, backbone, tokens, prompt_length, task_id):
    """Reward of one task for one text, and the scores of its experts."""
    config = model.config
    states, scores = [], []
    for expert in config.experts_of(config.task_names[task_id]):
        hidden = states_of(merged(backbone, model.experts, expert), tokens)
        state = pool(hidden, prompt_length, config.pooling)
        score = (
            dot(state, model.experts.head_weight[expert].tolist()) + model.experts.head_bias[expert].item()
        )
        scores.append((score - model.score_mean[expert].item()) / model.score_std[expert].item())
        units = zip(state, model.state_mean[expert].tolist(), model.state_std[expert].tolist(), strict=True)
        states.append([(value - mean) / std for value, mean, std in units])
    parameters = {name: tensor.tolist() for name, tensor in model.aggregators[task_id].state_dict().items()}
    reward = aggregate(config.aggregators[task_id], states, scores, parameters)
    if config.standardize:
        reward = (reward - model.reward_mean[task_id].item()) / model.reward_std[task_id].item()
    return reward, scores


def reward(model, backbone, tokens, prompt_length, *, routing="top1", task_id=None):
    """Reward of one text on the plain backbone: of the likeliest task, of the given one, or the soft mixture."""
    probs = task_probs(model, backbone, tokens, prompt_length)
    if routing == "soft":
        tasks = range(len(probs))
        return sum(probs[t] * task_reward(model, backbone, tokens, prompt_length, t)[0] for t in tasks)
    used = task_id if routing == "given" else max(range(len(probs)), key=lambda t: probs[t])
    return task_reward(model, backbone, tokens, prompt_length, used)[0]
