"""The dtype of frozen weights: which one the machine computes fast in."""

from typing import Literal

import torch

DtypeName = Literal["auto", "float32", "bfloat16"]

DTYPE_HELP = (
    "of the frozen weights; auto: bfloat16 where GPU or CPU (AMX, AVX-512 BF16) compute in it, else float32"
)


def resolve_dtype(name: DtypeName, device: torch.device) -> torch.dtype:
    """The dtype that a setting means on a device.

    A CPU without bfloat16 arithmetic emulates it: on one with AVX2 alone SmolLM2-135M took 4.6
    times as long as in float32 (benchmarks/body_dtype.py, docs/results.md).

    Args:
        name: The setting; "auto" asks the device.
        device: Where the weights will be.
    """
    if name != "auto":
        return torch.float32 if name == "float32" else torch.bfloat16
    return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return False  # others are untested, and float32 is right everywhere
