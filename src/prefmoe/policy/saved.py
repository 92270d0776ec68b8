"""Using a saved policy: measuring it, looking inside, generating, exporting."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from prefmoe.data.read import read_pairs
from prefmoe.data.render import Renderer
from prefmoe.errors import CheckpointError, ConfigError, DataError
from prefmoe.evaluation.files import write_text
from prefmoe.evaluation.metrics import Metrics, build_metrics
from prefmoe.nn import steering_factors
from prefmoe.policy.bench import load_language_model, load_tokenizer
from prefmoe.policy.config import PMoLConfig
from prefmoe.policy.evaluate import implicit_margins
from prefmoe.policy.export import ExportReport, export_lora, mean_weights
from prefmoe.policy.inspect import RoutingTable, inspect_routing
from prefmoe.policy.logps import completion_logps
from prefmoe.policy.pairs import TokenPairs, draw, encode, preference_of
from prefmoe.policy.pictures import draw_routing
from prefmoe.policy.sampling import sample_answers
from prefmoe.policy.settings import ModelSettings
from prefmoe.policy.tuner import PMoLModel
from prefmoe.records import Message
from prefmoe.runs.inputs import hash_of_files
from prefmoe.runs.progress import Progress, silent


def adapter_folder(folder: Path) -> Path:
    """The folder of a trained policy: itself, or of a run with PMoL, that of its PMoL adapter.

    Raises:
        CheckpointError: It holds no adapter.
    """
    for found in (folder, folder / "pmol"):
        if (found / "adapter_config.json").exists():
            return found
    inside = sorted(str(file.parent) for file in folder.glob("*/adapter_config.json"))
    hint = f"give one of {', '.join(inside)}" if inside else "expected a folder such as runs/policy/pmol"
    raise CheckpointError(f"{folder}: holds no adapter; {hint}")


def saved_config(folder: Path, weights: Mapping[str, float] | None = None) -> PeftConfig:
    """The config of a trained policy, before its model is loaded.

    Raises:
        CheckpointError: The folder holds no adapter.
        ConfigError: There are weights to steer with, but it cannot be steered by them.
    """
    folder = adapter_folder(folder)
    config = PeftConfig.from_pretrained(folder)
    if weights and not isinstance(config, PMoLConfig):
        raise ConfigError(f"{folder}: is no PMoL adapter, it cannot be steered; leave --prefer out")
    if isinstance(config, PMoLConfig):
        steering_factors(dict(weights or {}), config.layout)
    return config


def load_saved(
    folder: Path, weights: Mapping[str, float] | None = None
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """A trained policy, steered by preference weights, with its tokenizer.

    Raises:
        CheckpointError: The folder holds no adapter, a damaged one, or one of another language model.
        ConfigError: There are weights to steer with, but it cannot be steered by them.
    """
    folder = adapter_folder(folder)
    name = saved_config(folder, weights).base_model_name_or_path or ""
    base = load_language_model(ModelSettings(name=name))
    try:
        model = PeftModel.from_pretrained(base, folder)
    except CheckpointError as problem:
        raise CheckpointError(f"{folder}: does not fit {name}: {problem}") from problem
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as problem:
        raise CheckpointError(
            f"{folder}: damaged, or not for {name}: {str(problem).splitlines()[0]}"
        ) from problem
    if weights:
        model.base_model.set_preference_weights(weights)
    where = str(folder) if (folder / "tokenizer_config.json").exists() else name
    return model.eval(), load_tokenizer(where)


def adapter_hash(folder: Path) -> str:
    """16 hex digits that identify a saved adapter: its config and its weights."""
    return hash_of_files(sorted(adapter_folder(folder).glob("adapter_*")))


def longest_prompt(model: PeftModel, max_new_tokens: int) -> int:
    """Tokens of a prompt that leave room for an answer."""
    limit: int = model.get_base_model().config.max_position_embeddings
    return max(16, limit - max_new_tokens)


def evaluate_saved(
    folder: Path,
    files: Sequence[str],
    *,
    weights: Mapping[str, float],
    beta: float,
    max_length: int,
    progress: Progress = silent,
) -> tuple[Metrics, RoutingTable | None]:
    """Accuracy of implicit rewards by preference, and for PMoL its routing."""
    model, tokenizer = load_saved(folder, weights)
    pairs = _read(files, tokenizer, max_length=max_length)
    with model.disable_adapter():
        reference = completion_logps(model, pairs.texts(), progress=progress, label="reference")
    preferences = [row.preference for row in pairs.rows]
    table = None
    if isinstance(model.base_model, PMoLModel):
        found = inspect_routing(model, pairs.texts(), preferences * 2, progress=progress, label="policy")
        logps, table = found.logps, found.table
    else:
        logps = completion_logps(model, pairs.texts(), progress=progress, label="policy")
    margins = implicit_margins(logps, reference, beta=beta).tolist()
    names = list(dict.fromkeys(preferences))
    by_preference = {n: [m for m, p in zip(margins, preferences, strict=True) if p == n] for n in names}
    prompts = {n: [row.prompt for row in pairs.rows if row.preference == n] for n in names}
    method = folder.name.replace("-", "_") or "policy"
    return build_metrics({method: by_preference}, prompt_ids=prompts, subject=method), table


def write_weights(
    folder: Path, source: str, out: Path, *, limit: int, max_length: int, progress: Progress = silent
) -> Path:
    """Draws the routing on a file's texts; returns the file with the numbers."""
    model, tokenizer = load_saved(folder)
    if not isinstance(model.base_model, PMoLModel):
        raise ConfigError(f"{folder}: is no PMoL adapter, it has no routers to look at")
    pairs = _read([source], tokenizer, max_length=max_length, limit=limit)
    preferences = [row.preference for row in pairs.rows] * 2
    table = inspect_routing(model, pairs.texts(), preferences, progress=progress).table
    draw_routing(table, out)
    numbers = out.with_suffix(".json")
    write_text(numbers, table.model_dump_json(indent=1))
    return numbers


def answer(
    folder: Path,
    prompts: Sequence[str],
    *,
    weights: Mapping[str, float],
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> Iterator[str]:
    """Answers, one prompt after the other."""
    model, tokenizer = load_saved(folder, weights)
    renderer = Renderer(tokenizer, max_length=longest_prompt(model, max_new_tokens))
    for number, prompt in enumerate(prompts):
        ids = renderer.encode_prompt((Message("user", prompt),)).input_ids
        yield from sample_answers(
            model,
            tokenizer,
            [ids],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed + number,
        )


def export_saved(
    folder: Path, out: Path, *, weights: Mapping[str, float], source: str | None, max_length: int
) -> ExportReport | None:
    """Writes a plain LoRA; without weights, at the mean weights on the texts of `source`.

    Raises:
        ConfigError: Neither weights nor texts to find them on.
    """
    model, tokenizer = load_saved(folder)
    pairs = _read([source], tokenizer, max_length=max_length, limit=50) if source else TokenPairs([])
    if not weights and not pairs.rows:
        raise ConfigError(
            "export: give weights (--prefer GROUP=WEIGHT), or pairs to find them on (--measure-on FILE)"
        )
    texts = pairs.texts()
    if not weights:
        weights = mean_weights(model, texts, [row.preference for row in pairs.rows] * 2)
    report = export_lora(model, out, weights=weights, texts=texts)
    tokenizer.save_pretrained(out)
    return report


def _read(
    files: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, max_length: int, limit: int | None = None
) -> TokenPairs:
    pairs = [pair for file in files for pair in read_pairs(file, split="test")]
    if not any(preference_of(pair) for pair in pairs):
        raise DataError("no row has a 'preference' (or 'task')", files[0])
    names = dict.fromkeys(preference_of(pair) for pair in pairs)
    drawn = [p for n in names for p in draw([q for q in pairs if preference_of(q) == n], limit, 0)]
    return encode(drawn, Renderer(tokenizer, max_length=max_length), allow_equal=True)
