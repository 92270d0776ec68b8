"""Sampled answers of policies, judged by a reward model: what log-probabilities of given answers cannot show."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from pydantic import BaseModel
from transformers import PreTrainedTokenizerBase

from prefmoe.data.read import read_pairs
from prefmoe.data.render import Renderer
from prefmoe.errors import ConfigError, DataError
from prefmoe.evaluation.accuracy import bootstrap_interval
from prefmoe.policy.pairs import draw, preference_of
from prefmoe.policy.sampling import sample_answers
from prefmoe.policy.saved import load_saved, longest_prompt, steer
from prefmoe.records import Completion, Message, PreferencePair
from prefmoe.runs.progress import Progress, silent

BASE = "base"
Judge = Callable[[Sequence[Completion]], Sequence[float]]


class Estimate(BaseModel):
    """A mean over prompts with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


class JudgedAnswers(BaseModel):
    """Answers of one policy to the prompts of one preference.

    Attributes:
        reward: Mean reward of the answers that have text, in the judge's units; None if none has.
        wins: Share of prompts on which the answer has a higher reward than that of the model without adapter, ties
            one half; an answer without text loses to any other. None for that model itself.
        empty: Answers without text.
        prompts: How many.
    """

    reward: Estimate | None
    wins: Estimate | None = None
    empty: int
    prompts: int


class AnsweredPrompt(BaseModel):
    """One prompt with every policy's answer and its reward (None: no text)."""

    preference: str
    prompt: str
    answers: dict[str, str]
    rewards: dict[str, float | None]


class Judgement(BaseModel):
    """Every policy, preference by preference, and every answer, to be read."""

    policies: dict[str, dict[str, JudgedAnswers]]
    answers: list[AnsweredPrompt]


def judge_policies(
    folders: Sequence[Path],
    files: Sequence[str],
    judge: Judge,
    *,
    tasks: Sequence[str],
    weights: Mapping[str, float],
    prompts_per_preference: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    progress: Progress = silent,
) -> Judgement:
    """Lets policies and the model below them answer the same prompts, and a judge reward the answers.

    Args:
        folders: Of adapters on the same language model.
        files: Pairs, of which the prompts are used; a row's preference is its column `preference`, or else `task`.
        judge: Gives every completion a reward; its `task` is the preference.
        tasks: Those that the judge knows.
        weights: What PMoL policies are steered with.
        prompts_per_preference: Drawn by `seed`, each prompt once.
        max_new_tokens: Longest answer.
        temperature: Of sampling; 0 takes the likeliest token.
        seed: Of draws and sampling.
        progress: Shows how far it is.

    Raises:
        ConfigError: Two folders of one name, or a preference that the judge has no task for.
        CheckpointError: A folder holds no policy.
    """
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names) or BASE in names:
        raise ConfigError(f"policies need different names, none of them {BASE!r}; got {', '.join(names)}")
    pairs = _draw_prompts(files, tasks, limit=prompts_per_preference, seed=seed)
    answers: dict[str, list[str]] = {}
    for folder in folders:
        model, tokenizer = load_saved(folder)
        steer(model, weights, folder)
        sample = partial(
            _answers,
            model,
            tokenizer,
            pairs,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            progress=progress,
        )
        if BASE not in answers:
            with model.disable_adapter():
                answers[BASE] = sample(label="answers of the model without adapter")
        answers[folder.name] = sample(label=f"answers of {folder.name}")
    rewards = {name: _rewards(judge, pairs, texts) for name, texts in answers.items()}
    return Judgement(policies=_compare(pairs, rewards, seed=seed), answers=_rows(pairs, answers, rewards))


def _draw_prompts(
    files: Sequence[str], tasks: Sequence[str], *, limit: int, seed: int
) -> list[PreferencePair]:
    """A pair for every prompt that is used."""
    by_prompt = {pair.prompt: pair for file in files for pair in read_pairs(file, split="test")}
    names = sorted({name for pair in by_prompt.values() if (name := preference_of(pair))})
    if not names:
        raise DataError("no row has a 'preference' (or 'task')", files[0])
    known = [name for name in names if name in tasks]
    if not known:
        raise ConfigError(
            f"the reward model knows none of the preferences {', '.join(names)}; its tasks are {', '.join(tasks)}"
        )
    of_name = {n: [pair for pair in by_prompt.values() if preference_of(pair) == n] for n in known}
    return [pair for rows in of_name.values() for pair in draw(rows, limit, seed)]


def _answers(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[PreferencePair],
    *,
    max_new_tokens: int,
    **options: Any,
) -> list[str]:
    renderer = Renderer(tokenizer, max_length=longest_prompt(model, max_new_tokens))
    ids = [renderer.encode_prompt(pair.prompt).input_ids for pair in pairs]
    return sample_answers(model, tokenizer, ids, max_new_tokens=max_new_tokens, **options)


def _rewards(judge: Judge, pairs: Sequence[PreferencePair], texts: Sequence[str]) -> list[float | None]:
    written = [i for i, text in enumerate(texts) if text.strip()]
    completions = [
        Completion(str(i), pairs[i].prompt, (Message("assistant", texts[i]),), task=preference_of(pairs[i]))
        for i in written
    ]
    rewards: list[float | None] = [None] * len(texts)
    for i, reward in zip(written, judge(completions) if completions else (), strict=True):
        rewards[i] = reward
    return rewards


def _compare(
    pairs: Sequence[PreferencePair], rewards: Mapping[str, Sequence[float | None]], *, seed: int
) -> dict[str, dict[str, JudgedAnswers]]:
    places: dict[str, list[int]] = {}
    for place, pair in enumerate(pairs):
        places.setdefault(str(preference_of(pair)), []).append(place)
    return {
        name: {
            preference: _judged(
                [row[i] for i in mine], None if name == BASE else [rewards[BASE][i] for i in mine], seed=seed
            )
            for preference, mine in places.items()
        }
        for name, row in rewards.items()
    }


def _judged(
    rewards: Sequence[float | None], base: Sequence[float | None] | None, *, seed: int
) -> JudgedAnswers:
    written = [reward for reward in rewards if reward is not None]
    wins = None
    if base is not None:
        lowest = float("-inf")
        pairs = zip(rewards, base, strict=True)
        sides = [(lowest if a is None else a, lowest if b is None else b) for a, b in pairs]
        wins = _estimate([float(a > b) + 0.5 * (a == b) for a, b in sides], seed)
    return JudgedAnswers(
        reward=_estimate(written, seed) if written else None,
        wins=wins,
        empty=len(rewards) - len(written),
        prompts=len(rewards),
    )


def _estimate(values: Sequence[float], seed: int) -> Estimate:
    found = bootstrap_interval(values, seed=seed)
    return Estimate(value=found.value, low=found.low, high=found.high)


def _rows(
    pairs: Sequence[PreferencePair],
    answers: Mapping[str, Sequence[str]],
    rewards: Mapping[str, Sequence[float | None]],
) -> list[AnsweredPrompt]:
    return [
        AnsweredPrompt(
            preference=str(preference_of(pair)),
            prompt="\n".join(message.content for message in pair.prompt),
            answers={name: texts[i] for name, texts in answers.items()},
            rewards={name: row[i] for name, row in rewards.items()},
        )
        for i, pair in enumerate(pairs)
    ]
