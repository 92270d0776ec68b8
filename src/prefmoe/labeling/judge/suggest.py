"""Points that a judge proposes for a task after reading sample pairs; a person edits them before they are used."""

import asyncio
import json
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from prefmoe.errors import ConfigError, PrefmoeError
from prefmoe.labeling.judge.budget import Prices
from prefmoe.labeling.judge.endpoint import Endpoint, Fault, open_endpoint
from prefmoe.labeling.judge.event_loop import run_alone
from prefmoe.labeling.judge.pace import Backoff
from prefmoe.labeling.judge.settings import JudgeSettings
from prefmoe.labeling.judge.wording import Wording
from prefmoe.labeling.tasks import TaskFile
from prefmoe.records import PreferencePair

SAMPLE = 20
_MAX_TOKENS = 1500
_TRIES = 3
_SAMPLE_CHARACTERS = 400  # of each text: three a pair, some 6,000 tokens for twenty pairs
_CHARACTERS_A_TOKEN = 4  # of English, roughly
_NAME = re.compile(r"[a-z][a-z0-9_]{1,40}")

_REQUEST = """Below are {number} examples of one kind of conversation. In each, people preferred answer 1 to answer 2.

{examples}

Name the 3 to 6 points on which answers of this kind should be judged. A point is one thing only, can be judged by
reading the two answers, and overlaps with no other point. Reply with one JSON object and nothing else:
{{"description": "<one sentence: what people want here>",
"points": {{"<name_in_snake_case>": "<one sentence that a good answer makes true>"}}}}"""


def suggest_tasks(pairs: Sequence[PreferencePair], settings: JudgeSettings, *, seed: int = 0) -> str:
    """A tasks file, as text, with what the judge proposes for every task of the pairs.

    Args:
        pairs: At most 20 of each task are shown, drawn by `seed`.
        settings: The judge; an endpoint, for it has to write.
        seed: Same seed, same sample.

    Raises:
        ConfigError: the judge is local, or cannot be asked, or the budget may not be enough.
        PrefmoeError: it proposes nothing that could be used.
    """
    if settings.is_local:
        raise ConfigError(
            f"judge {settings.judge!r} compares probabilities and writes nothing; --suggest needs an endpoint"
        )
    calls, to_read, to_write = (_TRIES * number for number in plan_suggestion(pairs))
    usd = Prices(settings.input_price or 0.0, settings.output_price or 0.0).cost(to_read, to_write)
    for name, most, limit in (("max_calls", calls, settings.max_calls), ("max_usd", usd, settings.max_usd)):
        if limit is not None and most > limit:
            raise ConfigError(
                f"--suggest may take {most:g} where proposals cannot be used ({_TRIES} tries a task), and {name} is "
                f"{limit:g}; raise it, or give pairs of fewer tasks"
            )
    content = run_alone(_suggest_all(pairs, settings, seed))
    TaskFile.model_validate(content)
    head = f"# Proposed by {settings.judge} from up to {SAMPLE} pairs a task: edit it, add what is missing.\n"
    return head + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=110)


def plan_suggestion(pairs: Sequence[PreferencePair]) -> tuple[int, int, int]:
    """Calls of `suggest_tasks` if every proposal can be used, most tokens it reads (roughly), most it writes."""
    texts = [min(SAMPLE, len(rows)) * 3 * _SAMPLE_CHARACTERS for rows in _by_task(pairs).values()]
    return len(texts), sum(texts) // _CHARACTERS_A_TOKEN, len(texts) * _MAX_TOKENS


def _by_task(pairs: Sequence[PreferencePair]) -> dict[str, list[PreferencePair]]:
    tasks: dict[str, list[PreferencePair]] = {}
    for pair in pairs:
        tasks.setdefault(pair.task or "all", []).append(pair)
    return tasks


async def _suggest_all(pairs: Sequence[PreferencePair], settings: JudgeSettings, seed: int) -> dict[str, Any]:
    endpoint = open_endpoint(settings)
    try:
        proposals = {
            task: await _suggest_one(endpoint, task, random.Random(seed).sample(rows, min(SAMPLE, len(rows))))
            for task, rows in _by_task(pairs).items()
        }
    finally:
        await endpoint.close()
    return {"tasks": proposals}


async def _suggest_one(endpoint: Endpoint, task: str, sample: Sequence[PreferencePair]) -> dict[str, Any]:
    wording = Wording(max_characters=_SAMPLE_CHARACTERS)
    examples = "\n\n".join(wording.texts(pair.prompt, pair.chosen, pair.rejected) for pair in sample)
    request = _REQUEST.format(number=len(sample), examples=examples)
    problem = ""
    for attempt in range(_TRIES):
        try:
            text = await endpoint.write([{"role": "user", "content": request}], limit=_MAX_TOKENS)
            return _checked(text)
        except Fault as fault:
            problem = str(fault)
            await asyncio.sleep(Backoff().delay(attempt, fault.wait))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            problem = f"{error}; got {text[:200]!r}"
    raise PrefmoeError(
        f"judge {endpoint.model!r} proposed nothing usable for task {task!r} in {_TRIES} tries: {problem}; "
        "write the points by hand, or take a stronger judge"
    )


def _checked(text: str) -> dict[str, Any]:
    """The proposal as a task of a tasks file."""
    start, end = text.find("{"), text.rfind("}")
    proposal: Mapping[str, Any] = json.loads(text[start : end + 1])
    points = {str(name): str(sentence).strip() for name, sentence in proposal["points"].items()}
    wrong = [name for name in points if not _NAME.fullmatch(name)]
    if wrong or not all(points.values()) or not 1 <= len(points) <= 12:
        raise ValueError(f"expected 3 to 6 points with names in snake_case; names that are not: {wrong}")
    return {"description": str(proposal["description"]).strip(), "capabilities": points}
