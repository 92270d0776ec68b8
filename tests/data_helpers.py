"""Rows, files and tiny tokenizers for the tests of `prefmoe.data` and its command line."""

import gzip
import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from prefmoe.records import Message, PreferencePair

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Like Llama 2: BOS from the template, no generation prompt, roles must alternate.
STRICT = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '[' + m['content'] + ']' if m['role'] == 'user' else m['content'] + eos_token }}{% endfor %}"
)


def byte_tokenizer(
    chat_template: str | None = None, *, adds_bos: bool = False, merges: list[tuple[str, str]] | None = None
) -> PreTrainedTokenizerFast:
    """One token a byte (and one a merge), so that any text survives; specials are 0 to 3."""
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*special, *alphabet, *("".join(merge) for merge in merges or [])]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges or []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def user(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


def assistant(text: str) -> tuple[Message, ...]:
    return (Message("assistant", text),)


def make_pair(name: str = "p", prompt: str = "Why?", **changes: object) -> PreferencePair:
    fields = {"chosen": assistant("Because."), "rejected": assistant("No idea."), **changes}
    return PreferencePair(id=name, prompt=user(prompt), **fields)


def row(**changes: object) -> dict[str, object]:
    """A good row, changed; a value of None takes the column away."""
    values = {
        "prompt": "Why is the sky blue?",
        "chosen": "Rayleigh scattering.",
        "rejected": "Paint.",
        **changes,
    }
    return {name: value for name, value in values.items() if value is not None}


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    text = "".join(json.dumps(values) + "\n" for values in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path
