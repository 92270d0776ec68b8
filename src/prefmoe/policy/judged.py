"""Sampled answers of policies, judged by a reward model: what log-probabilities of given answers cannot show."""

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from pydantic import BaseModel, Field, TypeAdapter

from prefmoe.data.read import read_pairs
from prefmoe.data.render import Renderer
from prefmoe.errors import ConfigError, DataError
from prefmoe.evaluation.accuracy import bootstrap_interval
from prefmoe.evaluation.files import write_text
from prefmoe.policy.pairs import draw, preference_of
from prefmoe.policy.sampling import sample_answers
from prefmoe.policy.saved import adapter_hash, load_saved, longest_prompt, saved_config
from prefmoe.records import Completion, Message, PreferencePair
from prefmoe.runs.inputs import hash_of
from prefmoe.runs.progress import Progress, silent
from prefmoe.runs.run import Run
from prefmoe.runs.settings import Section

BASE = "base"
RESULT = "judged.json"
Judge = Callable[[Sequence[Completion]], Sequence[float]]
_TEXTS = TypeAdapter(list[str])


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


class JudgeSettings(Section):
    """What is compared; kept in the run folder, so that the same command goes on and another is refused.

    Attributes:
        policies: Folders of adapters on the same language model.
        reward_model: Folder of the judge.
        prompts_of: Files of pairs, of which the prompts are used; a row's preference is its column `preference`, or
            else `task`.
        prefer: What PMoL policies are steered with.
        prompts_per_preference: Drawn by `seed`, each prompt once.
        max_new_tokens: Longest answer.
        temperature: Of sampling; 0 takes the likeliest token.
        seed: Of draws and sampling.
        out: The run folder.
    """

    policies: list[str]
    reward_model: str
    prompts_of: list[str]
    prefer: dict[str, float] = Field(default_factory=dict)
    prompts_per_preference: int = Field(50, ge=1)
    max_new_tokens: int = Field(128, ge=1)
    temperature: float = Field(1.0, ge=0)
    seed: int = 0
    out: str


def judge_policies(
    settings: JudgeSettings, judge: Judge, *, tasks: Sequence[str], progress: Progress = silent
) -> Judgement:
    """Lets policies and the model below them answer the same prompts, and a judge reward the answers.

    The answers of each policy are a step of the run: the same call goes on with the next policy where it was stopped.

    Args:
        settings: What is compared.
        judge: Gives every completion a reward; its `task` is the preference.
        tasks: Those that the judge knows.
        progress: Shows how far it is.

    Returns:
        What `judged.json` in the run folder holds.

    Raises:
        ConfigError: Two folders of one name, a preference that the judge has no task for, or a run folder with
            another comparison in it.
        CheckpointError: A folder holds no policy.
    """
    folders = {Path(folder).name: Path(folder) for folder in settings.policies}
    if len(folders) < len(settings.policies) or BASE in folders:
        names = ", ".join(Path(folder).name for folder in settings.policies)
        raise ConfigError(f"policies need different names, none of them {BASE!r}; got {names}")
    pairs = _draw_prompts(settings, tasks)
    for folder in folders.values():
        saved_config(folder, settings.prefer)  # before there is a run folder
    run = Run(settings)
    run.check_inputs(
        {"the prompts": hash_of(f"{preference_of(pair)} {pair.prompt}" for pair in pairs)}
        | {f"policy {name}": adapter_hash(folder) for name, folder in folders.items()}
    )
    answer = partial(_answers, settings, run, pairs, progress=progress)
    answers = {BASE: answer(next(iter(folders.values())), name=None)}
    for name, folder in folders.items():
        answers[name] = answer(folder, name=name)
    rewards = {name: _rewards(judge, pairs, texts) for name, texts in answers.items()}
    judgement = Judgement(
        policies=_compare(pairs, rewards, seed=settings.seed), answers=_rows(pairs, answers, rewards)
    )
    write_text(run.folder / RESULT, judgement.model_dump_json(indent=1))
    return judgement


def _draw_prompts(settings: JudgeSettings, tasks: Sequence[str]) -> list[PreferencePair]:
    """A pair for every prompt that is used."""
    by_prompt = {pair.prompt: pair for file in settings.prompts_of for pair in read_pairs(file, split="test")}
    names = sorted({name for pair in by_prompt.values() if (name := preference_of(pair))})
    if not names:
        raise DataError("no row has a 'preference' (or 'task')", settings.prompts_of[0])
    known = [name for name in names if name in tasks]
    if not known:
        raise ConfigError(
            f"the reward model knows none of the preferences {', '.join(names)}; its tasks are {', '.join(tasks)}"
        )
    of_name = {n: [pair for pair in by_prompt.values() if preference_of(pair) == n] for n in known}
    limit = settings.prompts_per_preference
    return [pair for rows in of_name.values() for pair in draw(rows, limit, settings.seed)]


def _answers(
    settings: JudgeSettings,
    run: Run,
    pairs: Sequence[PreferencePair],
    folder: Path,
    *,
    name: str | None,
    progress: Progress,
) -> list[str]:
    """What a policy answers; without a name, the model below it."""

    def compute() -> list[str]:
        model, tokenizer = load_saved(folder, settings.prefer)
        renderer = Renderer(tokenizer, max_length=longest_prompt(model, settings.max_new_tokens))
        ids = [renderer.encode_prompt(pair.prompt).input_ids for pair in pairs]
        with contextlib.nullcontext() if name else model.disable_adapter():
            return sample_answers(
                model,
                tokenizer,
                ids,
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                seed=settings.seed,
                progress=progress,
                label=f"answers of {name}" if name else "answers of the model without adapter",
            )

    def save(file: Path, texts: list[str]) -> None:
        file.write_text(json.dumps(texts), encoding="utf-8")

    def load(file: Path) -> list[str]:
        return _TEXTS.validate_json(file.read_bytes())

    return run.step(f"answers_{name or BASE}.json", compute, save, load)


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
