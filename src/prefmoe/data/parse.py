"""From one raw row to checked records. Every problem of a row is collected, none is raised."""

from itertools import combinations
from typing import Any

from prefmoe.data.fields import (
    Values,
    capabilities_of,
    has_text,
    is_finite,
    messages_of,
    missing,
    name_of,
    number_of,
    probabilities_of,
    transcript_of,
)
from prefmoe.data.text import common_length, short
from prefmoe.records import Completion, Messages, PreferencePair


def parse_row(values: Values, *, row_id: str, problems: list[str]) -> list[PreferencePair]:
    """Pairs of one row: one, or with `completions` and `ranks` one for every two of different rank.

    Args:
        values: The row; columns as in DESIGN.md 2.10. Unknown columns are ignored.
        row_id: Id for a row that brings none.
        problems: Gets one sentence for each thing that is wrong with the row.

    Returns:
        The pairs; none if there was any problem. Pairs of ranks are named `<id>/<better>-<worse>`.
    """
    known = len(problems)
    common: dict[str, Any] = {
        "task": name_of(values, "task", problems),
        "preference": name_of(values, "preference", problems),
        "weight": number_of(values, "weight", 1.0, problems),
        "source": name_of(values, "source", problems),
    }
    if values.get("completions") is not None and not _has_side(values):
        pairs = _ranked_pairs(values, _id_of(values, row_id), common, problems)
    else:
        pairs = [_single_pair(values, _id_of(values, row_id), common, problems)]
    return pairs if len(problems) == known else []


def parse_completions(values: Values, *, row_id: str, problems: list[str]) -> list[Completion]:
    """What one row gives to score; arguments as for `parse_row`.

    That is `completion` (or `response`), each of the list `completions`, or both sides of a pair.
    """
    known = len(problems)
    row_id, task = _id_of(values, row_id), name_of(values, "task", problems)
    given = next((name for name in ("completion", "response") if values.get(name) is not None), None)
    if given is None and values.get("completions") is None and _has_side(values):
        prompt, chosen, rejected = _pair_texts(values, problems)
        answers = {f"{row_id}/chosen": chosen, f"{row_id}/rejected": rejected}
    else:
        prompt = _prompt_of(values, problems)
        if given is None and values.get("completions") is not None:
            listed = _completions_of(values, prompt, problems)
            answers = {f"{row_id}/{index}": answer for index, answer in enumerate(listed)}
        else:
            answers = {row_id: _completion_of(values, given or "completion", prompt, problems)}
    if len(problems) > known:
        return []
    return [Completion(answer_id, prompt, answer, task) for answer_id, answer in answers.items()]


def _id_of(values: Values, row_id: str) -> str:
    given = values.get("id")
    return row_id if given is None else str(given)


def _has_side(values: Values) -> bool:
    return values.get("chosen") is not None or values.get("rejected") is not None


def _single_pair(values: Values, row_id: str, common: dict[str, Any], problems: list[str]) -> PreferencePair:
    prompt, chosen, rejected = _pair_texts(values, problems)
    if chosen and chosen == rejected:
        problems.append("'chosen' and 'rejected' are equal; drop the row")
    return PreferencePair(
        id=row_id,
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        target_margin=number_of(values, "margin", 0.0, problems),
        capabilities=capabilities_of(values, problems),
        capability_probabilities=probabilities_of(values, problems),
        **common,
    )


def _ranked_pairs(
    values: Values, row_id: str, common: dict[str, Any], problems: list[str]
) -> list[PreferencePair]:
    prompt = _prompt_of(values, problems)
    completions = _completions_of(values, prompt, problems)
    ranks = values.get("ranks")
    if not isinstance(ranks, list) or len(ranks) != len(completions) or not all(map(is_finite, ranks)):
        expected = f"one number for each of the {len(completions)} completions"
        problems.append(f"'ranks' do not fit; got {short(ranks)}; expected {expected}")
        return []
    best_first = sorted(range(len(ranks)), key=ranks.__getitem__)
    ordered = [(i, j) for i, j in combinations(best_first, 2) if ranks[i] < ranks[j]]
    if not ordered:
        problems.append(f"'ranks' give no pair; got {short(ranks)}; expected at least two different numbers")
    if any(completions[i] and completions[i] == completions[j] for i, j in ordered):
        problems.append("equal completions have different ranks; give them the same rank or drop the row")
    return [
        PreferencePair(f"{row_id}/{i}-{j}", prompt, completions[i], completions[j], **common)
        for i, j in ordered
    ]


def _completions_of(values: Values, prompt: Messages, problems: list[str]) -> list[Messages]:
    given = values["completions"]
    if not isinstance(given, list) or not given:
        problems.append(f"'completions' is {short(given)}; expected a list of completions")
        return []
    named = {f"completions[{index}]": answer for index, answer in enumerate(given)}
    return [_completion_of(named, name, prompt, problems) for name in named]


def _pair_texts(values: Values, problems: list[str]) -> tuple[Messages, Messages, Messages]:
    """Prompt, chosen and rejected."""
    if values.get("prompt") is None:
        sides = {name: transcript_of(values[name]) for name in ("chosen", "rejected") if name in values}
        values = {**values, **sides}
        if shared := _shared_start(values):
            values = {**values, "prompt": shared}
    prompt = _prompt_of(values, problems)
    chosen, rejected = (_completion_of(values, name, prompt, problems) for name in ("chosen", "rejected"))
    return prompt, chosen, rejected


def _shared_start(values: Values) -> list[Any]:
    """The implicit prompt: messages that both sides begin with, but never a whole side."""
    chosen, rejected = values.get("chosen"), values.get("rejected")
    if not (isinstance(chosen, list) and isinstance(rejected, list)):
        return []
    return chosen[: common_length(chosen[:-1], rejected[:-1])]


def _prompt_of(values: Values, problems: list[str]) -> Messages:
    given = values.get("prompt")
    if given is None:
        problems.append(missing("prompt", values))
        return ()
    prompt = messages_of(given, "prompt", "user", problems)
    if prompt is not None and not has_text(prompt):
        problems.append("'prompt' is empty; expected text or messages with text")
    return prompt or ()


def _completion_of(values: Values, name: str, prompt: Messages, problems: list[str]) -> Messages:
    """Messages of a completion; a prompt repeated in front of it (as in UltraFeedback) is taken off."""
    given = values.get(name)
    if given is None:
        problems.append(missing(name, values))
        return ()
    messages = messages_of(given, name, "assistant", problems)
    if messages is None:
        return ()
    if prompt and messages[: len(prompt)] == prompt:
        messages = messages[len(prompt) :]
    if not has_text(messages):
        problems.append(f"'{name}' is empty; drop the row")
    elif (messages[0].role, messages[-1].role) != ("assistant", "assistant"):
        roles = short([message.role for message in messages])
        problems.append(f"'{name}' must begin and end with an assistant message; got roles {roles}")
    return messages
