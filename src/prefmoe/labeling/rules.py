"""Capability labels without a judge: plain functions that look at a completion, compared side by side.

A rule maps (prompt, completion) to a number, larger for better, or to None where it has nothing to go by.
Each one is a rough stand-in for what a judge would be asked, and its docstring says for what. Values are
shares in [0, 1] or logarithms, so one tie band fits all: 0.05 is five hundredths of a share, or five
hundredths more words. The word lists are English. To add a rule, write such a function and pass a table that
has it to `RuleLabeler`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from math import log1p
from typing import Self

from prefmoe.errors import ConfigError
from prefmoe.labeling.interface import Labels
from prefmoe.labeling.tasks import TaskFile
from prefmoe.labeling.words import (
    names,
    num_doubled,
    numbers,
    one_of,
    plain,
    request,
    runs,
    sentences,
    share,
    text_of,
    topics,
    words,
)
from prefmoe.records import Messages, PreferencePair
from prefmoe.suggest import nearest

Rule = Callable[[Messages, Messages], float | None]

_REFUSES = one_of(
    "sorry",
    "(?:i'm|i am) (?:afraid|unable|not (?:able|going|allowed|comfortable|willing))",
    "i (?:can't|cannot|can not|won't|will not|wouldn't|would not|don't want|do not want|don't think|refuse)",
    "(?:can't|cannot|not able to|unable to) (?:help|assist|answer|give|provide)",
)
_OBJECTS = one_of(
    "illegal|against the law|inappropriate|unethical|immoral|wrong|dangerous|harmful|hurtful|offensive",
    "bad idea",
    "not (?:a good|appropriate|acceptable|okay|ok|right|nice|kind|fair|legal)",
    "shouldn't|should not|please don't",
)
_EVADES = one_of(
    "i(?:'m| am) (?:not sure|not familiar|sorry)",
    "i (?:don't|do not) (?:know|understand|have)",
    "what do you mean|no idea|could you|can you (?:tell|explain|clarify|be more)",
)
_WARM = one_of(
    "sorry|hope|thank|thanks|glad|happy|welcome|please|love|great|wonderful|understand|feel|care|support|help"
)
_HARSH = one_of(
    r"kill\w*|murder\w*|attack\w*|hurt\w*|beat|beating|punch\w*|shoot\w*|violen\w*|rape\w*",
    "dead|die|dies|died|death",
    r"weapon\w*|guns?|knife|knives|bomb\w*|poison\w*|explosi\w*|burn\w*|drugs?|weed|cocaine|meth|alcohol|drunk",
    r"steal\w*|hack\w*|cheat\w*|lie|lies|lying|crim\w*|illegal\w*|password\w*|slurs?",
    r"hate\w*|stupid\w*|idiot\w*|dumb\w*|ugly|fuck\w*|shit\w*|ass|asshole\w*|dicks?|bitch\w*|damn\w*",
    r"sex\w*|porn\w*|naked|nude",
)
_STEPS = one_of(
    "you (?:can|could|might|may|need|should|would|will|want|just)",
    "try|first|then|next|make sure|use|get|put|take|find|buy|go to|start",
)
_LIST_ITEM = re.compile(r"^[ \t]*(?:\d+[.)]|[-*•])\s", re.MULTILINE)
_SLIP = re.compile(r"\s[.,!?;:]|&\w+;|(?<!\.)\.\.(?!\.)|,[.,]|\.,|[a-z]\.[A-Z]|\s's\b")
_END_MARKS = (".", "!", "?", "…", '"', "”", "'", "’", ")")
_LEAD_SENTENCES = 3


def concise(prompt: Messages, completion: Messages) -> float:
    """Says it in few words: minus the log of the number of words."""
    return -log1p(len(words(text_of(completion))))


def informative(prompt: Messages, completion: Messages) -> float:
    """Gives much content: log of the number of different content words, whether they are right or not."""
    return log1p(len(set(topics(text_of(completion)))))


def specific(prompt: Messages, completion: Messages) -> float:
    """Names things instead of staying vague: log of the number of different names and numbers."""
    text = text_of(completion)
    return log1p(len(names(text) | numbers(text)))


def structured(prompt: Messages, completion: Messages) -> float:
    """Is laid out as a list where there is something to list: log of the number of list items."""
    return log1p(len(_LIST_ITEM.findall(text_of(completion))))


def not_repetitive(prompt: Messages, completion: Messages) -> float | None:
    """Says nothing twice, neither now nor from its earlier turns: share of three-word runs that are new."""
    earlier = tuple(message for message in prompt if message.role == "assistant")
    said = set(runs(words(text_of(earlier)), 3))
    own = runs(words(text_of(completion)), 3)
    return len(set(own) - said) / len(own) if own else None


def on_topic(prompt: Messages, completion: Messages) -> float | None:
    """Takes up what was asked, or covers its source: share of the request's content words that come back.

    A word that the request repeats counts as often as it stands there, so main points weigh more than asides.
    """
    taken_up = set(topics(text_of(completion)))
    return share(topic in taken_up for topic in topics(request(prompt)))


def adds_nothing(prompt: Messages, completion: Messages) -> float | None:
    """Brings in nothing from outside: share of the completion's content words that stand in the request."""
    given = set(topics(request(prompt)))
    return share(topic in given for topic in set(topics(text_of(completion))))


def faithful(prompt: Messages, completion: Messages) -> float | None:
    """Keeps to the wording of its source: share of neighboring word pairs that stand in the request too."""
    given = set(runs(words(request(prompt)), 2))
    return share(run in given for run in set(runs(words(text_of(completion)), 2)))


def covers_lead(prompt: Messages, completion: Messages) -> float | None:
    """Has what a news text puts first: share of content words of its first sentences that come back."""
    lead = " ".join(sentences(request(prompt))[:_LEAD_SENTENCES])
    covered = set(topics(text_of(completion)))
    return share(topic in covered for topic in set(topics(lead)))


def keeps_numbers_and_names(prompt: Messages, completion: Messages) -> float | None:
    """Loses no number or name of its source: share of them that come back, names in any case."""
    source, text = request(prompt), text_of(completion)
    kept = numbers(text) | set(words(text))
    return share(item in kept for item in numbers(source) | names(source))


def direct(prompt: Messages, completion: Messages) -> float | None:
    """Answers instead of asking back or passing: share of sentences that are neither question nor evasion."""
    return share(
        not (sentence.rstrip().endswith("?") or _EVADES.search(plain(sentence)))
        for sentence in sentences(text_of(completion))
    )


def declines(prompt: Messages, completion: Messages) -> float | None:
    """Refuses or objects: share of sentences with a phrase such as "I can't", "illegal", "a bad idea"."""
    return share(
        bool(_REFUSES.search(sentence) or _OBJECTS.search(sentence))
        for sentence in sentences(plain(text_of(completion)))
    )


def mild(prompt: Messages, completion: Messages) -> float:
    """Keeps away from violence, drugs, crime and insults: minus the log of the number of such words."""
    return -log1p(len(_HARSH.findall(plain(text_of(completion)))))


def no_instructions(prompt: Messages, completion: Messages) -> float:
    """Does not tell how to do it: minus the log of the number of phrases such as "you could"."""
    return -log1p(len(_STEPS.findall(plain(text_of(completion)))))


def warm(prompt: Messages, completion: Messages) -> float | None:
    """Is kind and polite: share of sentences with a word such as "glad", "sorry", "thanks" or "hope"."""
    return share(bool(_WARM.search(sentence)) for sentence in sentences(plain(text_of(completion))))


def fluent(prompt: Messages, completion: Messages) -> float:
    """Is tidy written language: minus the log of the number of slips.

    Slips are spaces before punctuation, stray entities, doubled marks and words, no capital at the start and
    no mark at the end. Grammar and word choice are not looked at.
    """
    text = text_of(completion).strip()
    slips = len(_SLIP.findall(text)) + num_doubled(words(text))
    return -log1p(slips + (not text[:1].isupper()) + (not text.endswith(_END_MARKS)))


RULES: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (
        concise,
        informative,
        specific,
        structured,
        not_repetitive,
        on_topic,
        adds_nothing,
        faithful,
        covers_lead,
        keeps_numbers_and_names,
        direct,
        declines,
        mild,
        no_instructions,
        warm,
        fluent,
    )
}
"""Every rule by its name, as tasks files name them."""


class RuleLabeler:
    """Labels each pair by comparing what the rules of its task say about the two sides.

    A pair of a task without rules gets no labels; a rule with nothing to go by on a side gives none either.
    """

    name = "rules"

    def __init__(
        self,
        tasks: Mapping[str, Sequence[str] | Mapping[str, str]],
        *,
        rules: Mapping[str, Rule] = RULES,
        tie_band: float = 0.05,
    ) -> None:
        """Looks up the rules.

        Args:
            tasks: Task -> names of rules, or capability -> name of its rule where the two names differ.
            rules: The rules to choose from.
            tie_band: Values that differ by no more than this are a tie. At least 0.

        Raises:
            ConfigError: A rule that is not in `rules`, or a negative tie band.
        """
        if not tie_band >= 0:
            raise ConfigError(f"tie_band={tie_band!r} is negative; choose 0 or more")
        self._tie_band = tie_band
        self._tasks = {
            task: {
                capability: _find_rule(rules, name, where=f"{task}.{capability}")
                for capability, name in _named(points).items()
            }
            for task, points in tasks.items()
        }

    @classmethod
    def from_tasks(cls, task_file: TaskFile, *, rules: Mapping[str, Rule] = RULES) -> Self:
        """A labeler for all capabilities of a tasks file that name a rule."""
        return cls(task_file.rules(), rules=rules)

    @property
    def capabilities(self) -> tuple[str, ...]:
        """The capabilities of all tasks, in the order given."""
        return tuple(dict.fromkeys(name for points in self._tasks.values() for name in points))

    def label(self, pairs: Sequence[PreferencePair]) -> list[Labels]:
        """The labels of each pair for the capabilities of its task."""
        return [self._label_one(pair) for pair in pairs]

    def _label_one(self, pair: PreferencePair) -> Labels:
        labels: dict[str, int] = {}
        for capability, rule in self._tasks.get(pair.task or "", {}).items():
            chosen, rejected = rule(pair.prompt, pair.chosen), rule(pair.prompt, pair.rejected)
            if chosen is not None and rejected is not None:
                margin = chosen - rejected
                labels[capability] = (margin > self._tie_band) - (margin < -self._tie_band)
        return labels


def _named(points: Sequence[str] | Mapping[str, str]) -> Mapping[str, str]:
    return points if isinstance(points, Mapping) else {name: name for name in points}


def _find_rule(rules: Mapping[str, Rule], name: str, *, where: str) -> Rule:
    if name in rules:
        return rules[name]
    near = nearest(name, rules)
    hint = f"did you mean {near!r}?" if near else f"expected one of {', '.join(map(repr, rules))}"
    raise ConfigError(f"tasks.{where}: no rule is called {name!r}; {hint}")
