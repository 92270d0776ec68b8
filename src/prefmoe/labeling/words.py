"""What the rules see of a text: its words, sentences, numbers and names.

All of it is rough on purpose: fast, without a model or a download, and easy to read. Words are those of
languages that put spaces between them.
"""

import re
from collections.abc import Iterable
from itertools import pairwise

from prefmoe.records import Messages

_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")
_SENTENCE_END = re.compile(r"(?<=[.!?…])\s+|\n+")
_NUMBER = re.compile(r"\d+(?:[.,:]\d+)*")
_NAME = re.compile(r"\b[A-Z][A-Za-z]+")
_STEM_LETTERS = 5

_FUNCTION_WORDS = frozenset(
    """a about all also am an and any are as at be been being but by can could did do does for from had has
    have he her here him his how i if in into is it its just may me might more most my no not of on or our out
    over she should so some than that the their them then there these they this those to too up us very was we
    were what when where which who why will with would yes you your""".split()
)


def one_of(*phrases: str) -> re.Pattern[str]:
    r"""A pattern for any of the phrases as whole words; a phrase may be a regular expression: `hurt\w*`."""
    return re.compile(rf"\b(?:{'|'.join(phrases)})\b")


def text_of(messages: Messages) -> str:
    """The contents of all messages, one after the other."""
    return "\n".join(message.content for message in messages)


def request(prompt: Messages) -> str:
    """The last message of the user: what the completion answers, or the source it works on."""
    return next((message.content for message in reversed(prompt) if message.role == "user"), "")


def plain(text: str) -> str:
    """Lower case and straight apostrophes, so that word lists match."""
    return text.lower().replace("’", "'")


def words(text: str) -> list[str]:
    """The words in order, plain."""
    return _WORD.findall(plain(text))


def topics(text: str) -> list[str]:
    """The words that carry content, in order, cut to five letters so that inflected forms meet."""
    return [word[:_STEM_LETTERS] for word in words(text) if len(word) > 2 and word not in _FUNCTION_WORDS]


def sentences(text: str) -> list[str]:
    """The sentences and lines in order."""
    return [sentence for sentence in _SENTENCE_END.split(text) if sentence.strip()]


def numbers(text: str) -> set[str]:
    """The numbers, written without thousands separators."""
    return {number.replace(",", "") for number in _NUMBER.findall(text)}


def names(text: str) -> set[str]:
    """The capitalized words, plain: names, and also whatever starts a sentence."""
    return {plain(name) for name in _NAME.findall(text)}


def runs(items: list[str], length: int) -> list[tuple[str, ...]]:
    """All stretches of `length` neighbors."""
    return list(zip(*(items[start:] for start in range(length)), strict=False))


def share(found: Iterable[bool]) -> float | None:
    """Share of true ones; None if there are none at all."""
    values = list(found)
    return sum(values) / len(values) if values else None


def num_doubled(items: list[str]) -> int:
    """How often an item stands right after itself."""
    return sum(first == second for first, second in pairwise(items))
