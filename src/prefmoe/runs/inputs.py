"""Short hashes of what a run works on, for `Run.check_inputs`."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn


def hash_of(lines: Iterable[str]) -> str:
    """16 hex digits that identify some lines and their order."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()[:16]


def hash_of_files(files: Iterable[Path]) -> str:
    """16 hex digits that identify what some files hold, in their order; those that are not there count for nothing."""
    digest = hashlib.sha256()
    for file in files:
        if file.is_file():
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]


def weights_hash(model: nn.Module) -> str:
    """16 hex digits that identify the weights: names, shapes, and every value, rounded to bfloat16.

    So it is the same for the same weights stored in bfloat16 or loaded to any device. A billion weights take one or two
    seconds.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy())
    return digest.hexdigest()[:16]
