"""The shared lower layers: run once per text, kept on disk for everything that is trained above them."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefmoe.backbone.layers import embed, run_layers
from prefmoe.backbone.packing import pack_texts, packed_batches
from prefmoe.errors import CheckpointError
from prefmoe.nn import Packing
from prefmoe.reward.texts import TextTable
from prefmoe.runs.inputs import weights_hash
from prefmoe.runs.progress import Advance, Progress, silent

_INDEX, _DATA = "index.tsv", "states.bin"
# Text key, then where its states are: first token, number of tokens.
_LINE = re.compile(rb"([0-9a-f]+)((?:\t\d+\+\d+)+)\n")


class Batch(NamedTuple):
    """Trunk output of some texts, in one row without padding."""

    trunk: Tensor  # (nodes, hidden)
    packing: Packing  # which node is which token of which text
    starts: Tensor  # (texts,) first token of the completion


class Trunk:
    """Layers [0, split_layer) of a backbone over the texts of a table.

    Texts that begin alike share the states of their beginning. With a folder, states are kept in one append-only file
    in the backbone's own dtype (so keeping them rounds nothing: they are bitwise those of the same batch computed
    afresh) beside an index of text hashes; an interrupted write costs at most its last batch. Without one, or where
    the file would pass `max_gib`, states are computed when asked for.

    Args:
        backbone: Frozen backbone.
        split_layer: First layer that is not the trunk's.
        table: Texts, by number.
        folder: Parent of the cache folder, whose name comes from the backbone's weights and `split_layer`.
        max_gib: Largest size of the cache file, GiB.
        batch_tokens: Tokens of one forward pass; what texts share counts once.
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
        self._where: dict[str, list[range]] = {}  # text key -> its tokens in the file
        self._kept = 0  # tokens of the file that can be used
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
        self._where, self._index_bytes, self._kept = {}, 0, 0
        num_tokens = (self.folder / _DATA).stat().st_size // self._token_bytes
        for line in (self.folder / _INDEX).read_bytes().splitlines(keepends=True):
            found = _LINE.fullmatch(line)
            if found is None:
                break
            pieces = [_piece(text) for text in found[2].decode().split()]
            end = max(piece.stop for piece in pieces)
            if end > num_tokens:
                break
            self._where[found[1].decode()] = pieces
            self._kept = max(self._kept, end)
            self._index_bytes += len(line)
        if self._where:
            # Copy on write: torch wants writable memory, and nothing ever writes to it.
            self._data = np.memmap(
                self.folder / _DATA, dtype=np.uint8, mode="c", shape=(self._kept, self._token_bytes)
            )

    def prepare(self, texts: Sequence[int], progress: Progress = silent) -> None:
        """Computes and keeps the states of texts that are not on disk yet."""
        if self.folder is None:
            return
        by_key = {self.table.key(text): text for text in texts}  # equal ids once, wherever their prompts end
        keys, wanted = list(by_key), list(by_key.values())
        encoded = [self.table.texts[text] for text in wanted]
        # Batches of all, of which those that are there are left out: a run that was killed goes on with the same ones.
        missing = [
            [wanted[i] for i in batch if keys[i] not in self._where]
            for batch in packed_batches(encoded, self.batch_tokens, hidden=self.hidden)
        ]
        batches = [batch for batch in missing if batch]
        packings = [self._pack(batch) for batch in batches]
        num_tokens = sum(len(packing.tokens) for packing in packings)
        if (self._kept + num_tokens) * self._token_bytes > self.max_bytes:
            return
        try:
            with progress("shared trunk", num_tokens) as advance:
                self._write(zip(batches, packings, strict=True), advance)
        except OSError as problem:
            raise CheckpointError(
                f"{self.folder}: the trunk's states cannot be kept: {problem}; what is there stays usable, free some "
                "disk or set backbone.trunk_cache to false"
            ) from problem
        self.reload()

    def _write(self, batches: Iterable[tuple[Sequence[int], Packing]], advance: Advance) -> None:
        """Appends the states of batches of texts behind what is there."""
        assert self.folder is not None
        with (
            (self.folder / _DATA).open("ab") as data,
            (self.folder / _INDEX).open("a", encoding="ascii") as index,
        ):
            # Drops what a killed run left half done: data without an index line, lines without data.
            data.truncate(self._kept * self._token_bytes)
            index.truncate(self._index_bytes)
            for texts, packing in batches:
                data.write(self._compute(packing).contiguous().view(torch.uint8).numpy().tobytes())
                data.flush()
                # In the order of the data: a line names nothing that stands behind what later lines name.
                nodes = sorted(zip(packing.nodes(), texts, strict=True), key=lambda pair: pair[0][-1])
                for of_text, text in nodes:
                    pieces = "".join(f"\t{self._kept + first}+{number}" for first, number in _runs(of_text))
                    index.write(f"{self.table.key(text)}{pieces}\n")
                index.flush()
                self._kept += len(packing.tokens)
                advance(len(packing.tokens))

    def batch(self, texts: Sequence[int]) -> Batch:
        """States of some texts, on the backbone's device."""
        device = self.backbone.device
        starts = torch.tensor([self.table.texts[text].prompt_length for text in texts], device=device)
        packing = self._pack(texts)
        found = [self._where[key] for key in map(self.table.key, texts) if key in self._where]
        if len(found) < len(texts):
            return Batch(self._compute(packing).to(device), packing, starts)
        places = np.empty(len(packing.tokens), dtype=np.int64)
        for nodes, pieces in zip(packing.nodes(), found, strict=True):
            places[nodes] = np.concatenate(pieces)
        states = torch.from_numpy(self._data[places]).view(self.backbone.dtype)
        return Batch(states.to(device), packing, starts)

    def _pack(self, texts: Sequence[int]) -> Packing:
        return pack_texts([self.table.texts[text].input_ids for text in texts], hidden=self.hidden)

    @torch.no_grad()
    def _compute(self, packing: Packing) -> Tensor:
        states = embed(self.backbone, packing.tokens.to(self.backbone.device))
        return run_layers(self.backbone, states, self.backbone.layers[: self.split_layer], packing).cpu()


def _piece(text: str) -> range:
    first, number = map(int, text.split("+"))
    return range(first, first + number)


def _runs(nodes: list[int]) -> list[tuple[int, int]]:
    """First and number of the stretches without a gap."""
    borders = [i for i in range(1, len(nodes)) if nodes[i] != nodes[i - 1] + 1]
    starts, ends = [0, *borders], [*borders, len(nodes)]
    return [(nodes[start], end - start) for start, end in zip(starts, ends, strict=True)]
