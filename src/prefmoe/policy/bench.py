"""What all methods of a policy run share: pairs, tokenizer, reference, and how a model comes about."""

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from prefmoe.data.render import Renderer
from prefmoe.errors import ConfigError
from prefmoe.hub import WITHOUT_A_HUB, resolve_backbone
from prefmoe.policy.logps import completion_logps
from prefmoe.policy.pairs import TokenPairs, encode, read_splits
from prefmoe.policy.settings import ModelSettings, PolicySettings
from prefmoe.runs.inputs import hash_of, weights_hash
from prefmoe.runs.precision import resolve_dtype
from prefmoe.runs.progress import Progress, silent
from prefmoe.runs.run import Run, process_state


@dataclass
class PolicyBench:
    """What is worked on.

    Attributes:
        preferences: Names, in the order of the groups.
        splits: Pairs of "train", "validation" and "test".
        reference: Log-probability of every text of a split under the model without adapter: chosen, then rejected.
    """

    settings: PolicySettings
    run: Run
    preferences: list[str]
    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    splits: dict[str, TokenPairs]
    reference: dict[str, Tensor]
    progress: Progress

    def new_model(self) -> PreTrainedModel:
        """The language model without adapter."""
        return load_language_model(self.settings.model)


def build_bench(settings: PolicySettings, *, progress: Progress = silent) -> PolicyBench:
    """Reads, draws and renders the pairs, and computes the reference once for all methods.

    Raises:
        ConfigError, DataError: Something of it cannot be used.
    """
    preferences, splits = read_splits(settings.data, seed=settings.seed)
    tokenizer = load_tokenizer(settings.model.name)
    renderer = Renderer(tokenizer, max_length=settings.model.max_length)
    encoded = {name: encode(pairs, renderer, allow_equal=name != "train") for name, pairs in splits.items()}
    run = Run(settings, independent=["methods"])  # each has steps of its own
    model = load_language_model(settings.model)
    run.check_inputs(
        {f"the {name} pairs": hash_of(map(str, pairs.rows)) for name, pairs in encoded.items()}
        | {"the model": weights_hash(model), "the model's dtype": str(model.dtype)}
    )

    def compute() -> dict[str, Tensor]:
        return {
            name: completion_logps(
                model,
                pairs.texts(),
                batch_tokens=settings.model.batch_tokens,
                progress=progress,
                label=f"reference on {name} pairs",
            )
            for name, pairs in encoded.items()
            if pairs.rows
        }

    reference = run.step("reference.safetensors", compute, _save, load_file)
    return PolicyBench(settings, run, preferences, tokenizer, renderer, encoded, reference, progress)


def _save(file: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, file)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a language model.

    Raises:
        ConfigError: There is none.
    """
    try:
        return AutoTokenizer.from_pretrained(resolve_backbone(name))
    except (OSError, ValueError) as problem:
        raise ConfigError(
            f"model {name!r} has no tokenizer that can be read; {_first_line(problem)}"
        ) from problem


def load_language_model(settings: ModelSettings) -> PreTrainedModel:
    """The language model that a policy starts from, on this process's device.

    Raises:
        ConfigError: It cannot be loaded.
    """
    device = process_state().device
    dtype = resolve_dtype(settings.dtype, device)
    try:
        model = AutoModelForCausalLM.from_pretrained(resolve_backbone(settings.name), dtype=dtype)
    except (ImportError, OSError, ValueError, SafetensorError) as problem:
        raise ConfigError(
            f"model {settings.name!r} cannot be loaded: {_first_line(problem)}; {WITHOUT_A_HUB}"
        ) from problem
    return model.to(device)


def _first_line(problem: Exception) -> str:
    return str(problem).splitlines()[0]
