"""Saving and loading a reward model: the small artefact (no backbone) and the self-contained one."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Self

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefmoe.backbone.layers import load_backbone, new_backbone
from prefmoe.errors import CheckpointError, ConfigError
from prefmoe.reward.config import DMoERMConfig
from prefmoe.runs.inputs import weights_hash

_BACKBONE = "backbone."
_WEIGHTS = "model.safetensors"
_BACKBONE_OPTIONS = ("attn_implementation", "device_map")

# What a mixin may call on itself is known to the type checker only through the class it is mixed into.
if TYPE_CHECKING:
    from transformers import PreTrainedModel as _MixedInto
else:
    _MixedInto = object


class ArtefactMixin(_MixedInto):
    """`save_pretrained` and `from_pretrained` of a model made of a frozen backbone and small trained parts.

    The small artefact holds experts, router, aggregators and the backbone's name and hash. Loading gets the
    backbone by its name and refuses one with another hash.
    """

    config: DMoERMConfig
    backbone: PreTrainedModel

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        include_backbone: bool = False,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_shard_size: int | str = "5GB",
        **_: Any,
    ) -> None:
        """Writes the model, reloads it, compares, and only then replaces what was there.

        Args:
            save_directory: Folder, made if needed.
            include_backbone: Also write the frozen weights, so that the folder needs nothing else.
            tokenizer: Written beside the model.
            max_shard_size: Largest weight file.

        Raises:
            CheckpointError: what was read back differs, or the disk is full; the old files are then untouched.
        """
        target = Path(save_directory)
        self.config.architectures = [type(self).__name__]
        self.config.includes_backbone = include_backbone
        self.config.text_config.dtype = self.backbone.dtype
        if self.config.backbone_hash is None:
            self.config.backbone_hash = weights_hash(self.backbone)
        tensors = own_tensors(self, include_backbone=include_backbone)
        try:
            target.mkdir(parents=True, exist_ok=True)
            # Inside the target: on the same disk, so that moving a file into place is a rename.
            with TemporaryDirectory(prefix=".saving-", dir=target, ignore_cleanup_errors=True) as name:
                staging = Path(name)
                save_torch_state_dict(
                    tensors, staging, max_shard_size=max_shard_size, metadata={"format": "pt"}
                )
                self.config.save_pretrained(staging)
                _compare(tensors, read_tensors(staging))
                _compare_configs(self.config, read_config(staging))
                if tokenizer is not None:
                    _save_tokenizer(tokenizer, staging)
                _replace_files(target, staging)
        except (OSError, SafetensorError) as problem:
            raise CheckpointError(
                f"{target}: could not be saved, what was there is unchanged: {problem}"
            ) from problem

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *_: Any,
        config: DMoERMConfig | None = None,
        dtype: torch.dtype | str | None = None,
        backbone: PreTrainedModel | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> Self:
        """Loads a saved model, in evaluation mode.

        Args:
            pretrained_model_name_or_path: Folder or hub id.
            config: Use this instead of the saved config.
            dtype: Of the backbone; None takes the one it was trained with. The small parts are float32 always.
            backbone: An already loaded backbone to put the experts on.
            revision: Of the hub repository.
            **kwargs: `attn_implementation` reaches the backbone; so does `device_map` if it is loaded by its name.

        Raises:
            CheckpointError: a file is missing or damaged, a tensor is missing or unknown (it is named), or the
                backbone is not the one that the experts were trained on.
            ConfigError: `quantization_config` is given: quantized weights are others than those trained on.
        """
        if kwargs.get("quantization_config") is not None:
            raise ConfigError(
                "quantization_config: a quantized backbone gives other rewards than the one that the experts were "
                "trained on; leave it out (dtype=torch.bfloat16 halves the memory)"
            )
        folder = _local_folder(pretrained_model_name_or_path, revision)
        config = config if isinstance(config, DMoERMConfig) else read_config(folder)
        tensors = read_tensors(folder)
        is_given = backbone is not None
        if backbone is None:
            options = {name: kwargs[name] for name in _BACKBONE_OPTIONS if kwargs.get(name) is not None}
            backbone = _build_backbone(folder, config, options)
        if not config.includes_backbone:
            _check_hash(folder, config, backbone)
        model = cls(config, backbone=backbone)
        _load_strictly(model, tensors, folder)
        if config.includes_backbone:
            _check_hash(folder, config, backbone)
        if dtype not in (None, "auto") and not is_given:
            backbone.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        if kwargs.get("device_map") is not None:
            model.to(backbone.device)  # our parts go where the backbone went
        model.config.name_or_path = str(pretrained_model_name_or_path)
        return model.eval()


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(folder)
    except Exception as problem:  # its Rust core raises plain ones where the disk is full
        raise OSError(str(problem)) from problem


def own_tensors(model: Any, *, include_backbone: bool) -> dict[str, Tensor]:
    """The tensors that a save of the model holds, contiguous and unshared."""
    return {
        name: tensor.detach().contiguous()
        for name, tensor in model.state_dict().items()
        if include_backbone or not name.startswith(_BACKBONE)
    }


def read_config(folder: Path) -> DMoERMConfig:
    """The saved config.

    Raises:
        CheckpointError: there is none, or it is not one of ours.
    """
    file = folder / "config.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        model_type = content.get("model_type") if isinstance(content, dict) else None
        if model_type == DMoERMConfig.model_type:
            return DMoERMConfig.from_pretrained(folder).check()
    # The last three come from values of the wrong kind, which transformers takes as they are.
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as problem:
        raise CheckpointError(f"{file}: no readable config of a reward model: {problem}") from problem
    raise CheckpointError(f"{file}: model_type is {model_type!r}, expected {DMoERMConfig.model_type!r}")


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of all safetensors files of a folder.

    Raises:
        CheckpointError: there is no such file, or one is damaged; it is named.
    """
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: holds no {_WEIGHTS}; expected a folder written by save_pretrained")
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                tensors |= {name: opened.get_tensor(name) for name in opened.keys()}
        except (SafetensorError, OSError) as problem:
            raise CheckpointError(
                f"{file}: damaged or cut short ({problem}); save or copy it again"
            ) from problem
    return tensors


def _replace_files(target: Path, staging: Path) -> None:
    for stale in target.glob("model*.safetensors*"):
        if not (staging / stale.name).exists():
            stale.unlink()
    for file in sorted(staging.iterdir(), reverse=True):  # weights before config.json
        file.replace(target / file.name)


def _compare(written: dict[str, Tensor], read: dict[str, Tensor]) -> None:
    for name in written.keys() | read.keys():
        same = name in written and name in read and torch.equal(written[name].cpu(), read[name])
        if not same:
            raise CheckpointError(f"{name} was read back differently from what was saved")


def _compare_configs(written: DMoERMConfig, read: DMoERMConfig) -> None:
    before, after = written.to_dict(), read.to_dict()
    names = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    names.discard("_name_or_path")  # where it was loaded from; a saved config does not say
    if names:
        raise CheckpointError(
            f"{', '.join(sorted(names))} of the config was read back differently from what was saved"
        )


def _load_strictly(model: Any, tensors: dict[str, Tensor], folder: Path) -> None:
    expected = own_tensors(model, include_backbone=model.config.includes_backbone)
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        raise CheckpointError(f"{folder}: missing tensors {missing[:5]}, unknown tensors {extra[:5]}")
    for name, tensor in expected.items():
        if tensor.shape != tensors[name].shape:
            shapes = f"{tuple(tensors[name].shape)}, expected {tuple(tensor.shape)}"
            raise CheckpointError(f"{folder}: {name} has shape {shapes}")
    model.load_state_dict(tensors, strict=False)


def _build_backbone(folder: Path, config: DMoERMConfig, options: dict[str, Any]) -> PreTrainedModel:
    """In the dtype that it was trained in: rounding to another one first could change its hash."""
    dtype = config.text_config.dtype
    if config.includes_backbone:
        backbone = new_backbone(config.text_config, dtype=dtype)
        if "attn_implementation" in options:
            backbone.set_attn_implementation(options["attn_implementation"])
        return backbone
    if config.backbone is None:
        raise CheckpointError(f"{folder}: holds no backbone and names none; pass backbone=")
    return load_backbone(
        config.backbone,
        num_layers=config.text_config.num_hidden_layers,
        dtype=dtype,
        max_length=config.max_tokens,
        **options,
    )


def _check_hash(folder: Path, config: DMoERMConfig, backbone: PreTrainedModel) -> None:
    found = weights_hash(backbone)
    if config.backbone_hash not in (None, found):
        raise CheckpointError(
            f"{folder}: trained on backbone {config.backbone!r} with weights {config.backbone_hash}, "
            f"but the one found has weights {found}; give the original backbone or retrain"
        )


def _local_folder(name: str | Path, revision: str | None) -> Path:
    if Path(name).is_dir():
        return Path(name)
    if "/" not in str(name) or str(name).startswith((".", "/", "~")):
        raise CheckpointError(
            f"{name}: no such folder; give the folder that `reward train` wrote, or a hub id"
        )
    try:
        return Path(snapshot_download(str(name), revision=revision))
    except Exception as problem:  # the hub client raises many kinds; all mean the same to a user
        raise CheckpointError(
            f"{name}: neither a folder nor found on the hub ({type(problem).__name__})"
        ) from problem
