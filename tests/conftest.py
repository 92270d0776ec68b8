"""Settings of the whole suite: no hub, seeds, hypothesis profiles.

`make test` also checks shapes and types of `prefmoe.nn` while the tests run, by
`--jaxtyping-packages=prefmoe.nn,beartype.beartype`; only `tests/unit/errors` runs without, because there a wrong
shape must reach our own message.
"""

import os

# Before transformers and huggingface_hub are imported: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest
import torch
from hypothesis import settings

settings.register_profile("ci", max_examples=50, derandomize=True, deadline=None, database=None)
# HYPOTHESIS_PROFILE=dev: more examples, and others each time.
settings.register_profile("dev", max_examples=200, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Seeds torch; pytest-randomly seeds `random` and numpy."""
    torch.manual_seed(0)
