"""The offline judge: a local model whose probabilities of the allowed answers are compared; nothing is generated.

All questions on the same two completions begin alike, up to the point asked about. That beginning is run once, and
every point's ending on top of its cached states.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from prefmoe.data.text import common_length
from prefmoe.errors import ConfigError
from prefmoe.hub import SMOLLM2, WITHOUT_A_HUB, resolve_backbone
from prefmoe.labeling.judge.answers import Answer, unusable
from prefmoe.labeling.judge.questions import Question, digest
from prefmoe.labeling.judge.store import Call
from prefmoe.labeling.judge.wording import FIRST, SECOND, TIE

_GROUPS_AT_ONCE = 64  # enough to sort by length, few enough that a stop costs little

# The files of a folder that answers depend on; logs and data sets may lie beside them.
_PARTS = ("*.safetensors", "*.bin", "*config.json", "tokenizer*", "chat_template*")
_SHOWN_DIGITS = 8


@dataclass(frozen=True, slots=True)
class _Ids:
    """A question as tokens: where its group parts from it, and the token by which each allowed answer begins."""

    question: Question
    ids: tuple[int, ...]
    answers: tuple[int, ...]


class LocalJudge:
    """Answers questions by the next-token probabilities of a causal language model.

    Args:
        model: A causal language model; it is put into evaluation mode.
        tokenizer: Its tokenizer. Without a chat template the question is given as plain text.
        batch_tokens: Tokens of one forward pass, padding included.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_tokens: int = 8192
    ) -> None:
        self._model, self._tokenizer, self._batch_tokens = model.eval(), tokenizer, batch_tokens
        self._max_length: int = getattr(model.config, "max_position_embeddings", None) or 2**31

    @classmethod
    def load(cls, name: str, *, dtype: torch.dtype = torch.float32) -> "LocalJudge":
        """The judge of a folder, a GGUF file, a known name such as `smollm2-135m`, or a hub id.

        Numerics:
            The head is float32 whatever `dtype` is: bfloat16 rounds logits of about 16 to a sixteenth of a nat or more,
            which is as much as the two orders of a weak judge differ by, and makes ties of near answers.

        Raises:
            ConfigError: there is no such model, or it has no tokenizer.
        """
        try:
            where = resolve_backbone(name)
            model, loaded = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, output_loading_info=True)
            tokenizer = AutoTokenizer.from_pretrained(where)
        except (ImportError, OSError, ValueError) as problem:
            raise _cannot_be_loaded(name, problem) from problem
        if loaded["missing_keys"]:  # transformers would go on with random ones
            missing = sorted(loaded["missing_keys"])
            raise ConfigError(
                f"local judge {name!r} lacks {len(missing)} tensors: {missing[:3]}; is it a language model?"
            )
        _widen_head(model)
        return cls(model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer)

    def ask(self, questions: Iterable[Question], record: Callable[[Sequence[Call]], None]) -> None:
        """Answers all questions; `record` gets them batch by batch.

        Questions on the same texts and order that follow one another share the work on these texts.
        """
        groups = (list(group) for _, group in groupby(questions, key=lambda q: (q.pair, q.task)))
        for chunk in _chunks(groups, _GROUPS_AT_ONCE):
            rows = [row for group in chunk for row in self._rows_of_pair(group, record)]
            for batch in self._batches(rows):
                record(self._answer(batch))

    def _rows_of_pair(
        self, questions: Sequence[Question], record: Callable[[Sequence[Call]], None]
    ) -> Iterator[list[_Ids]]:
        """For each order the questions as tokens; those that do not fit are recorded as such."""
        for swapped in (False, True):
            encoded = [self._encode(question) for question in questions if question.swapped == swapped]
            too_long = [row for row in encoded if len(row.ids) > self._max_length]
            if too_long:
                record([_call(r, unusable(r.question.points, "too long")) for r in too_long])
            fitting = [row for row in encoded if len(row.ids) <= self._max_length]
            if fitting:
                yield fitting

    def _encode(self, question: Question) -> _Ids:
        text = self._render(question)
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        answered = [
            self._tokenizer.encode(text + answer, add_special_tokens=False) for answer in question.allowed
        ]
        # What the answers share belongs to the question: a tokenizer may put a space mark in front of each.
        border = min(common_length(answered[0], other) for other in answered[1:])
        answers = tuple(row[border] for row in answered if len(row) > border)
        if border < len(ids) - 1 or len(set(answers)) < len(question.allowed):
            raise ConfigError(
                f"judge {question.judge!r}: its tokenizer does not tell the answers {question.allowed} apart by one "
                "token; choose another model"
            )
        return _Ids(question, tuple(answered[0][:border]), answers)

    def _render(self, question: Question) -> str:
        messages = [
            {"role": "system", "content": question.system},
            {"role": "user", "content": question.user},
        ]
        if not self._tokenizer.chat_template:
            return f"{question.system}\n\n{question.user}\n\n"
        text: str = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text

    def _batches(self, rows: Sequence[list[_Ids]]) -> Iterator[list[list[_Ids]]]:
        """Rows of similar length together, as many as `batch_tokens` allows."""
        batch: list[list[_Ids]] = []
        for row in sorted(rows, key=lambda row: max(len(one.ids) for one in row)):
            longest = max(len(one.ids) for one in row)
            if batch and longest * (len(batch) + 1) > self._batch_tokens:
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    @torch.inference_mode()
    def _answer(self, batch: Sequence[list[_Ids]]) -> list[Call]:
        """All questions of a batch: the shared beginning of each row once, then one ending of each row at a time."""
        shared = [_shared_length([one.ids for one in row]) for row in batch]
        beginning, mask = self._padded(
            [row[0].ids[:length] for row, length in zip(batch, shared, strict=True)]
        )
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        states = self._model(
            input_ids=beginning, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1
        ).past_key_values
        calls: list[Call] = []
        for index in range(max(map(len, batch))):
            # A row with fewer questions repeats its first, which costs little and is thrown away.
            asked = [row[index] if index < len(row) else row[0] for row in batch]
            logits = self._run_endings(asked, shared, mask, states)
            for row, one, of_row in zip(batch, asked, logits, strict=True):
                if index < len(row):
                    calls.append(_call(one, {one.question.points[0]: _choose(of_row, one)}))
        return calls

    def _run_endings(self, asked: Sequence[_Ids], shared: Sequence[int], mask: Tensor, states: Any) -> Tensor:
        """Logits behind the last token of each row, float32, shape (rows, vocab); `states` stay as they were."""
        endings = [one.ids[length:] for one, length in zip(asked, shared, strict=True)]
        ids, own = self._padded(endings)
        starts = torch.tensor(shared, device=ids.device).unsqueeze(1)
        out = self._model(
            input_ids=ids,
            attention_mask=torch.cat([mask, own], dim=1),
            position_ids=(starts + own.cumsum(-1) - 1).clamp(min=0),
            past_key_values=states,
            use_cache=True,
            logits_to_keep=1,
        )
        states.crop(-ids.shape[1])
        logits: Tensor = out.logits[:, -1].float()
        return logits

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Ids and mask, padded on the left so that all rows end together."""
        longest = max(map(len, rows))
        ids = [[0] * (longest - len(row)) + list(row) for row in rows]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        device = self._model.device
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _widen_head(model: PreTrainedModel) -> None:
    """A float32 head on a body of any dtype; embeddings that were tied to it stay as they are."""
    head = model.get_output_embeddings()
    if head.weight.dtype == torch.float32:
        return
    head.weight = torch.nn.Parameter(head.weight.detach().float(), requires_grad=False)
    if getattr(head, "bias", None) is not None:
        head.bias = torch.nn.Parameter(head.bias.detach().float(), requires_grad=False)
    head.register_forward_pre_hook(lambda _, states: (states[0].float(),))


def version_of(name: str) -> str:
    """8 hex digits for what a judge's name leads to now: a hash of the folder's files, or the commit on the hub.

    Raises:
        ConfigError: there is no such model.
    """
    try:
        where = resolve_backbone(name)
        if not Path(where).is_dir():
            return Path(str(cached_file(where, "config.json"))).parent.name[:_SHOWN_DIGITS]
        files = sorted({file for part in _PARTS for file in Path(where).glob(part)})
        return digest(*(f"{file.name} {_hash_of_file(file)}" for file in files))[:_SHOWN_DIGITS]
    except (ImportError, OSError, ValueError) as problem:
        raise _cannot_be_loaded(name, problem) from problem


def _hash_of_file(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _cannot_be_loaded(name: str, problem: Exception) -> ConfigError:
    hint = f"; {WITHOUT_A_HUB}" if name == SMOLLM2 else ""
    return ConfigError(f"local judge {name!r} cannot be loaded{hint}: {str(problem).splitlines()[0]}")


def _shared_length(rows: Sequence[tuple[int, ...]]) -> int:
    """Leading tokens that all rows share; at least one token of each stays out."""
    shortest = min(map(len, rows)) - 1
    return min([shortest, *(common_length(rows[0], row) for row in rows[1:])])


def _choose(logits: Tensor, one: _Ids) -> Answer:
    """The likeliest of the allowed answers, and their probabilities among themselves."""
    mass = dict(zip(one.question.allowed, logits[list(one.answers)].softmax(-1).tolist(), strict=True))
    choice = max(mass, key=mass.__getitem__)
    return Answer(choice, None, choice, (mass[FIRST], mass[SECOND], mass.get(TIE, 0.0)))


def _call(one: _Ids, answers: dict[str, Answer]) -> Call:
    return Call(one.question, answers, input_tokens=len(one.ids), output_tokens=0, usd=0.0)


def _chunks(items: Iterable[list[Question]], size: int) -> Iterator[list[list[Question]]]:
    chunk: list[list[Question]] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
