"""From messages to token ids: the one rendering that training, scoring and serving share."""

import hashlib
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2

from prefmoe.data.fields import has_text
from prefmoe.data.text import common_length
from prefmoe.errors import ConfigError, DataError
from prefmoe.records import Message, Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# For tokenizers without a chat template. No BOS here: the renderer adds the one the tokenizer asks for.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize + ': ' + message['content'] }}"
    "{% if message['role'] == 'assistant' and eos_token %}{{ eos_token }}{% endif %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
_MARK = "\ufdd0"  # a Unicode noncharacter: allowed inside a program, never in text that is exchanged
_DATE = "26 Jul 2024"  # Llama 3's templates print today's date, which would change rewards over night
# What tells tokenizers apart: their words, their numbers, what they make of white space and of other scripts.
_PROBE = (
    Message("user", "Which of the 1234567 answers is better?\n\t  Naïve “quotes”, 你好, <b>3.14</b> 🙂"),
)
_PROBE_ANSWER = (
    Message("assistant", "The second one, because it is honest; the others aren't helpful at all."),
)
_CACHED_PROMPTS = 64  # the completions of a prompt come one after the other


class Encoded(NamedTuple):
    """One rendered text.

    Attributes:
        input_ids: Token ids, at most `max_length`.
        prompt_length: Leading tokens that belong to the prompt, with the template's opening of the answer.
        truncated_tokens: Tokens that were cut away to fit.
    """

    input_ids: tuple[int, ...]
    prompt_length: int
    truncated_tokens: int


class Renderer:
    """Renders conversations with the tokenizer's chat template and tokenizes them.

    Without truncation the ids are those of `tokenizer.apply_chat_template`, with two exceptions. A tokenizer
    that opens plain text with BOS gets exactly one BOS, also if its template forgets it. And the name of a
    special token inside a content ("<|im_start|>" typed by a user) is encoded as plain characters, so that no
    text can fake a turn.

    Truncation keeps the completion. It drops the oldest turns of the prompt, then its system messages, then
    tokens from the left (all but BOS); a completion that is too long alone loses its end.

    Args:
        tokenizer: Any tokenizer of transformers.
        max_length: Largest number of tokens of a text.
        chat_template: Jinja template instead of the tokenizer's own.

    Raises:
        ConfigError: `max_length` leaves no room for a completion.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", *, max_length: int, chat_template: str | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.chat_template: str = chat_template or (
            tokenizer.get_chat_template() if tokenizer.chat_template else PLAIN_TEMPLATE
        )
        self._bos = _bos_of_plain_text(tokenizer)
        self._special = _special_pattern(tokenizer)
        self._prompt_ids = lru_cache(_CACHED_PROMPTS)(self._render_prompt)
        self.response_marker = self._find_response_marker()
        smallest = len(self.response_marker) + 2  # BOS, the marker, one token of the completion
        if max_length < smallest:
            raise ConfigError(
                f"max_length={max_length} leaves no room for a completion; choose {smallest} or more"
            )

    @property
    def template_hash(self) -> str:
        """16 hex digits that identify the rendering; stored with every model.

        Of the chat template, and of the tokens that it and the tokenizer make of one conversation: a tokenizer with
        other words has another.
        """
        tokens = self._parts(_PROBE, _PROBE_ANSWER)
        return hashlib.sha256(f"{self.chat_template} {tokens}".encode()).hexdigest()[:16]

    def encode(self, prompt: Messages, completion: Messages) -> Encoded:
        """Token ids of a prompt with its completion.

        Raises:
            DataError: The completion is empty, or the template refuses the conversation.
        """
        if not has_text(completion):
            raise DataError("the completion is empty; drop the row")
        return self._fit(prompt, completion)

    def encode_prompt(self, prompt: Messages) -> Encoded:
        """Token ids of a prompt alone, up to where the answer begins; truncated by the same rules.

        Raises:
            DataError: The template refuses the conversation.
        """
        return self._fit(prompt, ())

    def _fit(self, prompt: Messages, completion: Messages) -> Encoded:
        prompt_ids, completion_ids = self._parts(prompt, completion)
        full_length = len(prompt_ids) + len(completion_ids)
        for kept in _shorter_prompts(prompt):
            if len(prompt_ids) + len(completion_ids) <= self.max_length:
                break
            prompt_ids, completion_ids = self._parts(kept, completion)
        prompt_ids = self._cut_left(prompt_ids, room=self.max_length - len(completion_ids))
        input_ids = (prompt_ids + completion_ids)[: self.max_length]
        return Encoded(input_ids, len(prompt_ids), full_length - len(input_ids))

    def _cut_left(self, prompt_ids: tuple[int, ...], *, room: int) -> tuple[int, ...]:
        """The last `room` tokens; BOS and the opening of the answer stay in any case.

        A "BOS" that stands there several times opens turns (ChatML) and is cut like any token.
        """
        bos = prompt_ids[:1] if prompt_ids.count(self.tokenizer.bos_token_id) == 1 else ()
        room = max(room, len(bos) + len(self.response_marker))
        if len(prompt_ids) <= room:
            return prompt_ids
        return bos + prompt_ids[len(prompt_ids) - (room - len(bos)) :]

    def _parts(self, prompt: Messages, completion: Messages) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids of the prompt with the opening of the answer, and the ids that follow."""
        prompt_ids = self._prompt_ids(prompt)
        if not completion:
            return prompt_ids, ()
        input_ids = self._token_ids(prompt + completion)
        border = common_length(prompt_ids, input_ids)
        return input_ids[:border], input_ids[border:]

    def _render_prompt(self, prompt: Messages) -> tuple[int, ...]:
        return self._token_ids(prompt, add_generation_prompt=True)

    def _token_ids(self, messages: Messages, *, add_generation_prompt: bool = False) -> tuple[int, ...]:
        literals: list[str] = []

        def set_aside(match: re.Match[str]) -> str:
            literals.append(match[0])
            return f"{_MARK}{len(literals) - 1}{_MARK}"

        safe = [{"role": m.role, "content": self._special.sub(set_aside, m.content)} for m in messages]
        text = self._apply_template(safe, add_generation_prompt=add_generation_prompt)
        parts = re.split(f"{_MARK}([0-9]+){_MARK}", text)  # text, index, text, index, ..., text
        token_ids = self._tokenize(parts[0])
        for index, following in zip(parts[1::2], parts[2::2], strict=True):
            token_ids += self._tokenize(literals[int(index)], is_literal=True) + self._tokenize(following)
        if self._bos is not None and token_ids[:1] != [self._bos]:
            token_ids.insert(0, self._bos)
        return tuple(token_ids)

    def _tokenize(self, text: str, *, is_literal: bool = False) -> list[int]:
        ids: list[int] = self.tokenizer.encode(
            text, add_special_tokens=False, split_special_tokens=is_literal
        )
        return ids

    def _apply_template(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                date_string=_DATE,
            )
        except jinja2.TemplateError as error:
            roles = [message["role"] for message in messages]
            raise DataError(
                f"the chat template refuses the conversation ({error}); got roles {roles}; "
                "change the roles or give another template"
            ) from error
        return text

    def _find_response_marker(self) -> tuple[int, ...]:
        question = (Message("user", "x"),)
        without, opened = self._token_ids(question), self._token_ids(question, add_generation_prompt=True)
        return opened[common_length(without, opened) :]


def _shorter_prompts(prompt: Messages) -> Iterator[Messages]:
    """The prompt without its oldest turns, one more each time (a turn begins with a user message).

    System messages stay until only the last turn is left; then they go too.
    """
    turns = [index for index, message in enumerate(prompt) if message.role == "user"]
    for start in turns[1:]:
        yield tuple(message for message in prompt[:start] if message.role == "system") + prompt[start:]
    if turns:
        yield tuple(message for message in prompt[turns[-1] :] if message.role != "system")


def _bos_of_plain_text(tokenizer: Any) -> int | None:
    bos: int | None = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer.encode("x")[:1] == [bos] else None


def _special_pattern(tokenizer: Any) -> re.Pattern[str]:
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    names = sorted(special | set(tokenizer.all_special_tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, [*names, _MARK])))
