"""EMR-merging of LoRAs, a baseline: a language model for each preference, all made of one merged delta."""

from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from prefmoe.nn import elect_mask_rescale
from prefmoe.policy.bench import PolicyBench
from prefmoe.policy.logps import completion_logps
from prefmoe.policy.pairs import TokenPairs


def emr_logps(bench: PolicyBench, folder: Path, pairs: TokenPairs) -> Tensor:
    """Log-probabilities as `completion_logps` gives them, of every pair under the model of its own preference."""
    number = len(pairs.rows)
    logps = torch.zeros(2 * number)
    for preference, model in merged_models(bench, folder):
        places = [place for place, row in enumerate(pairs.rows) if row.preference == preference]
        texts = TokenPairs([pairs.rows[place] for place in places]).texts()
        logps[[*places, *(number + place for place in places)]] = completion_logps(
            model,
            texts,
            batch_tokens=bench.settings.model.batch_tokens,
            progress=bench.progress,
            label=f"testing emr on {preference}",
        )
    return logps


def merged_models(bench: PolicyBench, folder: Path) -> Iterator[tuple[str, torch.nn.Module]]:
    """The model of each preference, in evaluation mode: its weights and what EMR-merging adds to them.

    What is merged are products B A, which have no low rank once they are masked, so the sum is written into the
    weights (in their dtype). Merging takes the memory of three copies of them a preference.

    Args:
        bench: Of the run.
        folder: With one LoRA a preference, in a folder of its name.

    Yields:
        Preference and model.
    """
    names, deltas = _deltas(bench, folder)
    added = elect_mask_rescale(deltas)
    del deltas
    for index, preference in enumerate(bench.preferences):
        model = bench.new_model()
        with torch.no_grad():
            for name, tensor in zip(names, added, strict=True):
                model.get_submodule(name).weight += tensor[index]
        yield preference, model.eval()


@torch.no_grad()
def _deltas(bench: PolicyBench, folder: Path) -> tuple[list[str], list[Tensor]]:
    """Names of the layers that have LoRAs, and what each preference's adds to their weights."""
    first, *others = preferences = bench.preferences
    model = PeftModel.from_pretrained(bench.new_model(), folder / first, adapter_name=first)
    for name in others:
        model.load_adapter(folder / name, adapter_name=name)
    base = model.base_model.model
    layers = {name: layer for name, layer in base.named_modules() if isinstance(layer, LoraLayer)}
    deltas = [torch.stack([layer.get_delta_weight(p) for p in preferences]) for layer in layers.values()]
    return list(layers), deltas
