"""Texts to score, and the least that scoring them exactly can cost, in layer-tokens (DESIGN: one token, one layer)."""

import random
from collections.abc import Sequence

from prefmoe.data.read import read_pairs
from prefmoe.data.render import Encoded, Renderer


def pairs_of_file(file: str, num: int, *, renderer: Renderer, seed: int = 0) -> list[Encoded]:
    """Both sides of pairs drawn by seed."""
    drawn = random.Random(seed).sample(read_pairs(file, split="test"), num)
    return [renderer.encode(pair.prompt, side) for pair in drawn for side in (pair.chosen, pair.rejected)]


def made_up_texts(
    prompts: int,
    completions: int,
    *,
    prompt_tokens: int,
    completion_tokens: int,
    vocabulary: int,
    seed: int = 0,
) -> list[Encoded]:
    """So many completions of each of so many prompts, of random ids."""
    rng = random.Random(seed)

    def ids(number: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, vocabulary) for _ in range(number))  # 0 to 2 may be special

    return [
        Encoded(prompt + ids(completion_tokens), prompt_tokens, 0)
        for prompt in [ids(prompt_tokens) for _ in range(prompts)]
        for _ in range(completions)
    ]


def floor_layer_tokens(texts: Sequence[Encoded], *, layers: int, split_layer: int, experts: int) -> int:
    """Each prompt once, each completion once: through the trunk, and under every expert through the rest."""
    prompts = {text.input_ids[: text.prompt_length] for text in texts}
    tokens = sum(map(len, prompts)) + sum(len(text.input_ids) - text.prompt_length for text in texts)
    return tokens * (split_layer + experts * (layers - split_layer))


def naive_layer_tokens(texts: Sequence[Encoded], *, layers: int, experts: int) -> int:
    """Every text whole, one expert at a time."""
    return experts * layers * sum(len(text.input_ids) for text in texts)
