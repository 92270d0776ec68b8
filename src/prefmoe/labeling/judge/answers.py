"""From what a judge wrote to an answer that counts, or to the reason why it does not.

Nothing is guessed. An answer is exactly one of the allowed ones, alone or in exactly the JSON object that was asked
for. The paper's release takes the first "1" or "2" anywhere in the reply, so that "10 of 10 for the second" counts
as 1; here it is unusable.

Source:
    DMoERM's release, prepare_data/main.py (defect 18 in PAPERS.md).
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp
from typing import Any, Literal, NamedTuple

from prefmoe.labeling.judge.wording import FIRST, SECOND, SINGLE, TIE

Reason = Literal["refused", "cut off", "empty", "not an allowed answer", "too long", "rejected", "failed"]
"""Why an answer cannot be used: the model declined; it hit the limit of tokens; it wrote nothing; it wrote something
else; the question does not fit into its context; the endpoint rejects this question, or fails on it every time, while
it answers others."""

_SHOWN_CHARACTERS = 500


@dataclass(frozen=True, slots=True)
class Answer:
    """What a judge said on one point of one question.

    Attributes:
        choice: "1" (the completion shown first), "2" or "0" (neither); None if unusable.
        reason: Why it is unusable; None if it is not.
        text: What the judge wrote, cut to 500 characters.
        probabilities: Of "1", "2" and "0", fractions that sum to 1; None if the judge gave none.
    """

    choice: str | None
    reason: Reason | None = None
    text: str = ""
    probabilities: tuple[float, float, float] | None = None


class TokenOptions(NamedTuple):
    """One token of a reply and the likeliest tokens in its place, with log-probabilities in nats."""

    token: str
    options: Mapping[str, float]


def read_answers(
    text: str, points: Sequence[str], allowed: Sequence[str], *, tokens: Sequence[TokenOptions] = ()
) -> dict[str, Answer]:
    """The answers in a complete reply, one for each point.

    Args:
        text: The reply. White space around it does not count, nor do the marks of a Markdown code block.
        points: What was asked. One point: the bare answer, or `{"answer": "1"}`. Several: an object with exactly
            these keys.
        allowed: The answers that count. Full-width digits, words and numbers such as 1.0 do not.
        tokens: The reply's tokens, for probabilities.
    """
    shown = text[:_SHOWN_CHARACTERS]
    if not text.strip():
        return dict.fromkeys(points, Answer(None, "empty"))
    choices = _choices(text, points, allowed)
    keys = points if len(points) > 1 else [SINGLE]
    return {
        point: Answer(None, "not an allowed answer", shown)
        if choices.get(point) is None
        else Answer(choices[point], None, shown, _probabilities(text, key, allowed, tokens))
        for point, key in zip(points, keys, strict=True)
    }


def unusable(points: Sequence[str], reason: Reason, text: str = "") -> dict[str, Answer]:
    """The same reason for every point."""
    return dict.fromkeys(points, Answer(None, reason, text[:_SHOWN_CHARACTERS]))


def answer_schema(points: Sequence[str], allowed: Sequence[str]) -> dict[str, Any]:
    """The JSON schema of a reply, as `response_format` takes it."""
    keys = list(points) if len(points) > 1 else [SINGLE]
    return {
        "type": "object",
        "properties": {key: {"type": "string", "enum": list(allowed)} for key in keys},
        "required": keys,
        "additionalProperties": False,
    }


def _choices(text: str, points: Sequence[str], allowed: Sequence[str]) -> dict[str, str | None]:
    """What was chosen on each point; None where it is not allowed, no point at all where the form is wrong."""
    bare = text.strip()
    if len(points) == 1 and bare in allowed:
        return {points[0]: bare}
    try:
        values = json.loads(_without_fence(bare), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError):
        return {}
    keys = list(points) if len(points) > 1 else [SINGLE]
    if not isinstance(values, dict) or sorted(values) != sorted(keys):
        return {}
    # 1 for "1" is the same answer; 1.0 and true are not.
    chosen = [str(value) if type(value) is int else value for value in (values[key] for key in keys)]
    return {
        point: value if isinstance(value, str) and value in allowed else None
        for point, value in zip(points, chosen, strict=True)
    }


def _without_fence(text: str) -> str:
    match = re.fullmatch(r"```(?:json)?\s*\n(.*)\n\s*```", text, flags=re.DOTALL)
    return match[1] if match else text


def _unique_keys(items: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in items}) < len(items):
        raise ValueError("a key stands there twice, maybe with two values")
    return dict(items)


def _probabilities(
    text: str, key: str, allowed: Sequence[str], tokens: Sequence[TokenOptions]
) -> tuple[float, float, float] | None:
    """Of the allowed answers, among themselves, where the answer stands; None where tokens and text differ.

    Numerics:
        An allowed answer that is not among the likeliest tokens counts as 0.
    """
    if not tokens or "".join(token.token for token in tokens) != text:
        return None
    place = re.search(rf'"{re.escape(key)}"\s*:\s*"?([{"".join(allowed)}])', text)
    if place is None and text.strip() not in allowed:
        return None
    position = place.start(1) if place else len(text) - len(text.lstrip())
    before = ""
    options: Mapping[str, float] = {}
    for token, options in tokens:  # noqa: B007 - the last one is used below
        if position < len(token):
            before = token[:position]
            break
        position -= len(token)
    mass = {
        answer: sum(exp(nats) for option, nats in options.items() if option.startswith(before + answer))
        for answer in allowed
    }
    total = sum(mass.values())
    if not total:
        return None
    first, second, tie = (mass.get(answer, 0.0) / total for answer in (FIRST, SECOND, TIE))
    return first, second, tie
