"""Layer-tokens a second of the frozen body in float32 and in bfloat16: what `dtype: auto` goes by.

    python benchmarks/body_dtype.py --out benchmarks/results/body_dtype.json

Alternating repeats, median; the headline is bfloat16's speed as a multiple of float32's.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch

from prefmoe.backbone.layers import load_backbone
from prefmoe.runs.precision import has_fast_bfloat16


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256, help="of a row")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bodies = {
        str(dtype).removeprefix("torch."): load_backbone(
            "smollm2-135m", num_layers=arguments.layers, dtype=dtype
        ).to(device)
        for dtype in (torch.float32, torch.bfloat16)
    }
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(1000, 40_000, (arguments.rows, arguments.tokens), generator=generator)
    speeds: dict[str, list[float]] = {name: [] for name in bodies}
    with torch.inference_mode():
        for body in bodies.values():
            body(input_ids=token_ids.to(device))  # warm-up
        for _ in range(arguments.repeats):
            for name, body in bodies.items():
                start = time.perf_counter()
                body(input_ids=token_ids.to(device)).last_hidden_state.float().sum().item()  # waits for a GPU
                seconds = time.perf_counter() - start
                speeds[name].append(token_ids.numel() * arguments.layers / seconds)
    medians = {name: round(statistics.median(values)) for name, values in speeds.items()}
    result = {
        "bfloat16_over_float32": round(medians["bfloat16"] / medians["float32"], 3),
        "layer_tokens_per_second": medians,
        "has_fast_bfloat16": has_fast_bfloat16(device),
        "repeats": arguments.repeats,
        "machine": {
            "device": torch.cuda.get_device_name()
            if device.type == "cuda"
            else torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "platform": platform.platform(),
            "torch": torch.__version__,
        },
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
