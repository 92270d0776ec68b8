"""The shared lower layers: run once per text, kept on disk for everything that is trained above them."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefmoe.errors import CheckpointError
from prefmoe.reward.backbone import embed, run_layers
from prefmoe.reward.texts import TextTable, token_budget_batches
from prefmoe.runs.inputs import weights_hash
from prefmoe.runs.progress import Progress, silent

_INDEX, _DATA = "index.tsv", "states.bin"
_LINE = re.compile(rb"([0-9a-f]+)\t(\d+)\t(\d+)\n")  # text key, first token, number of tokens


class Batch(NamedTuple):
    """Trunk output of some texts, padded on the right."""

    trunk: Tensor  # (rows, seq, hidden)
    lengths: Tensor  # (rows,) real tokens
    starts: Tensor  # (rows,) first token of the completion


class Trunk:
    """Layers [0, split_layer) of a backbone over the texts of a table.

    With a folder, states are kept in one append-only file in the backbone's own dtype (so keeping them rounds nothing:
    they are bitwise those of the same batch computed afresh) beside an index of text hashes; an interrupted write
    costs at most its last batch. Without one, or where the file would pass `max_gib`, states are computed when asked
    for.

    Args:
        backbone: Frozen backbone.
        split_layer: First layer that is not the trunk's.
        table: Texts, by number.
        folder: Parent of the cache folder, whose name comes from the backbone's weights and `split_layer`.
        max_gib: Largest size of the cache file, GiB.
        batch_tokens: Tokens of one forward pass, padding included.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        split_layer: int,
        table: TextTable,
        *,
        folder: Path | None = None,
        max_gib: float = 16.0,
        batch_tokens: int = 8192,
    ) -> None:
        self.backbone, self.split_layer, self.table = backbone, split_layer, table
        self.batch_tokens, self.max_bytes = batch_tokens, max_gib * 2**30
        self.hidden = backbone.config.hidden_size
        self.folder: Path | None = None
        self._where: dict[str, tuple[int, int]] = {}  # text key -> first token, number of tokens
        self._index_bytes = 0  # of the index lines that can be used
        self._data = np.empty(0, dtype=np.uint8)
        if folder is not None:
            dtype = str(backbone.dtype).removeprefix("torch.")
            self.folder = folder / f"{weights_hash(backbone)}-{split_layer}-{dtype}"
            self.folder.mkdir(parents=True, exist_ok=True)
            self.reload()

    @property
    def _token_bytes(self) -> int:
        return self.hidden * self.backbone.dtype.itemsize

    def reload(self) -> None:
        """Reads what is on disk, as another process may have written it.

        Stops at the first line that an interrupted write left without its end or without its data.
        """
        if self.folder is None or not all((self.folder / name).exists() for name in (_INDEX, _DATA)):
            return
        self._where, self._index_bytes = {}, 0
        num_tokens = (self.folder / _DATA).stat().st_size // self._token_bytes
        for line in (self.folder / _INDEX).read_bytes().splitlines(keepends=True):
            found = _LINE.fullmatch(line)
            if found is None or int(found[2]) + int(found[3]) > num_tokens:
                break
            self._where[found[1].decode()] = (int(found[2]), int(found[3]))
            self._index_bytes += len(line)
        if self._where:
            # Copy on write: torch wants writable memory, and nothing ever writes to it.
            self._data = np.memmap(self.folder / _DATA, dtype=np.uint8, mode="c")

    def prepare(self, texts: Sequence[int], progress: Progress = silent) -> None:
        """Computes and keeps the states of texts that are not on disk yet."""
        if self.folder is None:
            return
        wanted = {self.table.key(text): text for text in texts}  # equal ids once, wherever their prompts end
        missing = [text for key, text in wanted.items() if key not in self._where]
        num_tokens = sum(self.table.length(text) for text in missing)
        kept = sum(n for _, n in self._where.values())
        if (kept + num_tokens) * self._token_bytes > self.max_bytes:
            return
        try:
            self._write(missing, kept, progress)
        except OSError as problem:
            raise CheckpointError(
                f"{self.folder}: the trunk's states cannot be kept: {problem}; what is there stays usable, free some "
                "disk or set backbone.trunk_cache to false"
            ) from problem
        self.reload()

    def _write(self, missing: Sequence[int], kept: int, progress: Progress) -> None:
        """Appends the states of texts behind the `kept` tokens that are there."""
        assert self.folder is not None
        num_tokens = sum(self.table.length(text) for text in missing)
        with (
            progress("shared trunk", num_tokens) as advance,
            (self.folder / _DATA).open("ab") as data,
            (self.folder / _INDEX).open("a", encoding="ascii") as index,
        ):
            # Drops what a killed run left half done: data without an index line, lines without data.
            data.truncate(kept * self._token_bytes)
            index.truncate(self._index_bytes)
            for batch in token_budget_batches([self.table.length(t) for t in missing], self.batch_tokens):
                members = [missing[i] for i in batch]
                states = self._compute(members)
                lengths = [self.table.length(text) for text in members]
                for row, length in zip(states, lengths, strict=True):
                    data.write(row[:length].contiguous().view(torch.uint8).numpy().tobytes())
                data.flush()
                for text, length in zip(members, lengths, strict=True):
                    index.write(f"{self.table.key(text)}\t{kept}\t{length}\n")
                    kept += length
                index.flush()
                advance(sum(lengths))

    def batch(self, texts: Sequence[int]) -> Batch:
        """States of some texts, on the backbone's device."""
        device = self.backbone.device
        lengths = torch.tensor([self.table.length(text) for text in texts], device=device)
        starts = torch.tensor([self.table.texts[text].prompt_length for text in texts], device=device)
        found = [self._where.get(self.table.key(text)) for text in texts]
        if None in found:
            return Batch(self._compute(texts).to(device), lengths, starts)
        states = torch.zeros(len(texts), int(lengths.max()), self.hidden, dtype=self.backbone.dtype)
        for row, place in zip(states, found, strict=True):
            first, number = place or (0, 0)
            raw = self._data[first * self._token_bytes : (first + number) * self._token_bytes]
            row[:number] = torch.from_numpy(raw).view(self.backbone.dtype).view(number, self.hidden)
        return Batch(states.to(device), lengths, starts)

    @torch.no_grad()
    def _compute(self, texts: Sequence[int]) -> Tensor:
        lengths = [self.table.length(text) for text in texts]
        token_ids = torch.zeros(len(texts), max(lengths), dtype=torch.long)
        for row, text in zip(token_ids, texts, strict=True):
            ids = self.table.texts[text].input_ids
            row[: len(ids)] = torch.tensor(ids)
        states = embed(self.backbone, token_ids.to(self.backbone.device))
        return run_layers(self.backbone, states, self.backbone.layers[: self.split_layer]).cpu()
