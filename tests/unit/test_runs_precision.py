"""Which dtype `auto` means."""

import pytest
import torch

from prefmoe.policy.settings import ModelSettings
from prefmoe.reward.settings import BackboneSettings
from prefmoe.runs.precision import has_fast_bfloat16, resolve_dtype


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> torch.device:
    """A CPU with the bfloat16 units that a test names."""
    for unit in ("amx_tile", "avx512_bf16"):
        monkeypatch.setattr(torch.cpu, f"_is_{unit}_supported", lambda unit=unit: unit in request.param)
    return torch.device("cpu")


@pytest.mark.parametrize(
    ("cpu", "expected"),
    [((), torch.float32), (("amx_tile",), torch.bfloat16), (("avx512_bf16",), torch.bfloat16)],
    indirect=["cpu"],
)
def test_auto_is_bfloat16_only_where_the_cpu_computes_in_it(cpu: torch.device, expected: torch.dtype) -> None:
    assert resolve_dtype("auto", cpu) == expected


@pytest.mark.parametrize("cpu", [(), ("amx_tile",)], indirect=True)
def test_a_named_dtype_wins_over_the_machine(cpu: torch.device) -> None:
    assert resolve_dtype("float32", cpu) == torch.float32
    assert resolve_dtype("bfloat16", cpu) == torch.bfloat16


@pytest.mark.parametrize("native", [True, False])
def test_a_gpu_that_only_emulates_bfloat16_gets_float32(
    monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native
    )
    assert has_fast_bfloat16(torch.device("cuda")) is native


def test_a_device_that_nobody_tried_gets_float32() -> None:
    assert resolve_dtype("auto", torch.device("meta")) == torch.float32


def test_auto_is_the_default_of_both_cores() -> None:
    assert BackboneSettings().dtype == ModelSettings().dtype == "auto"
