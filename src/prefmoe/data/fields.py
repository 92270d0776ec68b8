"""Checks of single columns. Each adds a sentence to `problems` for each thing that is wrong, and goes on."""

import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

from prefmoe.data.text import short
from prefmoe.records import Message, Messages
from prefmoe.suggest import nearest

ROLES = ("system", "user", "assistant", "tool")

Values = Mapping[str, Any]


def is_finite(value: object) -> TypeGuard[float]:
    """Whether `value` is a number, neither NaN nor infinite; True and False are no numbers."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max  # not isfinite(): it fails on integers past 1e308


def has_text(messages: Messages) -> bool:
    """Whether any message holds more than white space."""
    return any(message.content.strip() for message in messages)


def missing(name: str, values: Values) -> str:
    """Sentence about a column that is not there, with the keys that are and the likely slip of the pen."""
    if name in values:
        return f"'{name}' is null; expected text or messages"
    found = ", ".join(repr(key) for key in values)
    near = nearest(name, values)
    hint = f". Did you mean {near!r} -> {name!r}?" if near else ""
    return f"'{name}' is missing; keys found: {found or 'none'}{hint}"


def messages_of(given: object, name: str, role: str, problems: list[str]) -> Messages | None:
    """Messages of a text (one message of `role`) or of a list of messages; None if anything is wrong."""
    if isinstance(given, str):
        return (Message(role, given),) if _is_unicode(given, name, problems) else None
    if not isinstance(given, list):
        problems.append(
            f"'{name}' has the wrong type; got {short(given)}; expected text or a list of messages"
        )
        return None
    messages = [_message(item, f"{name}[{index}]", problems) for index, item in enumerate(given)]
    usable = tuple(message for message in messages if message is not None)
    return usable if len(usable) == len(messages) else None


def _message(item: object, name: str, problems: list[str]) -> Message | None:
    if not isinstance(item, dict) or not isinstance(item.get("content"), str):
        expected = "{'role': 'user', 'content': 'text'}"
        problems.append(f"'{name}' is not a message; got {short(item)}; expected {expected}")
        return None
    role, content = item.get("role"), item["content"]
    if role not in ROLES:
        problems.append(
            f"'{name}' has an unknown role; got {short(role)}; expected one of {', '.join(ROLES)}"
        )
        return None
    return Message(role, content) if _is_unicode(content, name, problems) else None


def _is_unicode(text: str, name: str, problems: list[str]) -> bool:
    r"""JSON may write half a character ("\ud83d"); no tokenizer can read it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"{text[error.start]!a} at character {error.start + 1}"
        problems.append(f"'{name}' holds half a surrogate pair; got {half}; write the whole character")
        return False
    return True


def transcript_of(given: object) -> object:
    r"""Messages of a transcript as hh-rlhf writes them ("\n\nHuman: Hi\n\nAssistant: Hello"); else what was given."""
    if not isinstance(given, str) or not given.startswith("\n\nHuman:"):
        return given
    _, *parts = re.split(r"\n\n(Human|Assistant):", given)
    turns = zip(parts[::2], parts[1::2], strict=True)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[speaker], "content": text.strip()} for speaker, text in turns]


def name_of(values: Values, name: str, problems: list[str]) -> str | None:
    """A column that holds a name or nothing."""
    given = values.get(name)
    if given is None:
        return None
    if not isinstance(given, str) or not given.strip():
        problems.append(f"'{name}' is no name; got {short(given)}; expected text, or leave it out")
        return None
    return given if _is_unicode(given, name, problems) else None


def number_of(values: Values, name: str, default: float, problems: list[str]) -> float:
    """A column that holds a finite number of at least 0, or nothing."""
    given = values.get(name)
    if given is None:
        return default
    if not is_finite(given) or given < 0:
        problems.append(f"'{name}' is {short(given)}; expected a finite number, 0 or more")
        return default
    return float(given)


def capabilities_of(values: Values, problems: list[str]) -> dict[str, int]:
    """Labels of `capabilities`; they win over numeric columns `cap_<name>_chosen`, `cap_<name>_rejected`."""
    given = values.get("capabilities")
    if given is not None and not isinstance(given, dict):
        problems.append(f"'capabilities' has the wrong type; got {short(given)}; expected {{'name': 1}}")
        given = None
    labels = _compared_columns(values, problems)
    for name, side in (given or {}).items():
        if side is None:  # Parquet fills names that a row does not have with None
            continue
        if not is_finite(side) or side not in (1, 0, -1):
            expected = "1 (chosen is better), -1 (rejected is better) or 0 (tie)"
            problems.append(f"capability {name!r} is {short(side)}; expected {expected}")
            continue
        labels[name] = int(side)
    return labels


def probabilities_of(values: Values, problems: list[str]) -> dict[str, float]:
    """Soft labels of `capability_probabilities`, as `prefmoe label --confidence` writes them."""
    given = values.get("capability_probabilities")
    if given is not None and not isinstance(given, dict):
        expected = "{'name': 0.9}"
        problems.append(
            f"'capability_probabilities' has the wrong type; got {short(given)}; expected {expected}"
        )
        given = None
    shares: dict[str, float] = {}
    for name, share in (given or {}).items():
        if share is None:  # as above
            continue
        if not is_finite(share) or not 0 <= share <= 1:
            expected = "a probability, from 0 (rejected is better) to 1 (chosen is better)"
            problems.append(f"capability_probabilities: {name!r} is {short(share)}; expected {expected}")
            continue
        shares[name] = float(share)
    return shares


def _compared_columns(values: Values, problems: list[str]) -> dict[str, int]:
    labels: dict[str, int] = {}
    for name in _compared_names(values):
        columns = f"cap_{name}_chosen", f"cap_{name}_rejected"
        chosen, rejected = (values.get(column) for column in columns)
        if chosen is None and rejected is None:
            continue
        if is_finite(chosen) and is_finite(rejected):
            labels[name] = (chosen > rejected) - (chosen < rejected)
            continue
        got = f"{short(chosen)}, {short(rejected)}"
        problems.append(f"{columns} are not comparable; got {got}; expected two finite numbers, or none")
    return labels


def _compared_names(values: Values) -> Iterable[str]:
    """Names in `cap_<name>_chosen` and `cap_<name>_rejected`, each once, in column order."""
    columns = [column for column in values if isinstance(column, str) and column.startswith("cap_")]
    ends = ("_chosen", "_rejected")
    return dict.fromkeys(c[len("cap_") :].rsplit("_", 1)[0] for c in columns if c.endswith(ends))
