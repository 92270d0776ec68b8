"""Alternating repeats, medians and ratios, and what they were taken on."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

Times = dict[str, list[float]]  # seconds of every repeat, by name


def device_at_hand() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds_of(work: Callable[[], object]) -> float:
    """What one call takes, work that it left to a GPU included."""
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def alternating(works: Mapping[str, Callable[[], object]], repeats: int) -> Times:
    """Seconds of each, one after the other and again, so that a slow minute of the machine hits all of them."""
    times: Times = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(seconds_of(work))
    return times


def median_ratio(times: Times, over: str, under: str) -> float:
    """Median of the ratios within a repeat."""
    return statistics.median(a / b for a, b in zip(times[over], times[under], strict=True))


def medians(times: Times) -> dict[str, float]:
    return {name: round(statistics.median(values), 4) for name, values in times.items()}


def machine() -> dict[str, object]:
    """What a number is worth nothing without."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "platform": platform.platform(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor()


def against(value: float, target: float) -> dict[str, object]:
    """A number beside the target it should at least reach."""
    return {"value": round(value, 3), "target": target, "reached": value >= target}


def at_most(value: float, target: float) -> dict[str, object]:
    """A number beside the target it should not exceed."""
    return {"value": round(value, 3), "target": target, "reached": value <= target}


def write_result(result: dict[str, object], out: Path | None) -> None:
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
