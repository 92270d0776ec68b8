"""The frozen transformer: loading it, cutting it, running a range of its layers."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AutoModel, PreTrainedConfig, PreTrainedModel

from prefmoe.errors import ConfigError
from prefmoe.hub import SMOLLM2, WITHOUT_A_HUB, resolve_backbone
from prefmoe.nn import AttentionPlan, Packing, attention_plan, packed_attention

# Pre-norm decoders whose layers map one state tensor to the next with rotary positions and full attention.
# Each is built tiny and compared with its own forward in tests/equivalence/test_backbone_families.py.
TESTED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma")

_ATTENTION = "sdpa"  # causal without a mask, on every device
_PACKED = "prefmoe_packed"  # of texts that share their beginnings


def check_family(config: object, *, max_length: int) -> None:
    """Refuses, with one sentence, a backbone whose layers we would run wrongly.

    Raises:
        ConfigError: unknown family, quantized weights, or attention windows shorter than the texts.
    """
    family = getattr(config, "model_type", None)
    if family not in TESTED_FAMILIES:
        raise ConfigError(
            f"backbone of type {family!r} is not supported; supported and tested: {', '.join(TESTED_FAMILIES)}"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(
            "the backbone is quantized, which changes its states and so every reward; give the weights it was made "
            "from (backbone.dtype: bfloat16 halves their memory)"
        )
    window: int = getattr(config, "sliding_window", None) or 0
    uses_window = window and (family == "mistral" or getattr(config, "use_sliding_window", False))
    if uses_window and window < max_length:
        raise ConfigError(
            f"the backbone attends to {window} tokens only, shorter than max_length={max_length}; lower max_length"
        )


def load_backbone(
    name: str,
    *,
    num_layers: int | None = None,
    dtype: torch.dtype = torch.float32,
    max_length: int = 1024,
    **options: Any,
) -> PreTrainedModel:
    """A frozen backbone in evaluation mode, cut to its first `num_layers` layers (None keeps all).

    `options` reach `AutoModel.from_pretrained`.

    Raises:
        ConfigError: the name leads nowhere, the family is not supported, or there are fewer layers.
    """
    options = {"attn_implementation": _ATTENTION, "output_loading_info": True, **options}
    try:
        model, loaded = AutoModel.from_pretrained(resolve_backbone(name), dtype=dtype, **options)
    # transformers raises ImportError without gguf
    except (ImportError, OSError, ValueError, SafetensorError) as problem:
        hint = f"; {WITHOUT_A_HUB}" if name == SMOLLM2 else ""
        raise ConfigError(
            f"backbone {name!r} cannot be loaded{hint}: {str(problem).splitlines()[0]}"
        ) from problem
    if loaded["missing_keys"]:  # transformers would go on with random ones
        missing = sorted(loaded["missing_keys"])
        raise ConfigError(f"backbone {name!r} lacks {len(missing)} tensors: {missing[:3]}; download it again")
    check_family(model.config, max_length=max_length)
    if num_layers is not None:
        cut_layers(model, num_layers)
    return model.requires_grad_(False).eval()


def new_backbone(config: PreTrainedConfig, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A frozen backbone with random weights, to load saved ones into."""
    model = AutoModel.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation=_ATTENTION)
    return model.requires_grad_(False).eval()


def cut_layers(model: PreTrainedModel, num_layers: int) -> None:
    """Drops the layers from `num_layers` on, in place.

    Raises:
        ConfigError: the model has fewer layers.
    """
    if not 1 <= num_layers <= len(model.layers):
        raise ConfigError(f"num_layers={num_layers}, but the backbone has {len(model.layers)} layers")
    model.layers = model.layers[:num_layers]
    model.config.num_hidden_layers = num_layers
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:num_layers]


def embed(backbone: PreTrainedModel, token_ids: Tensor) -> Tensor:
    """States below the first layer, shape (..., hidden)."""
    return backbone.embed_tokens(token_ids)


def run_layers(
    backbone: PreTrainedModel,
    states: Tensor,
    layers: Iterable[nn.Module],
    packing: Packing,
    *,
    call: Callable[..., Tensor] | None = None,
    gradient_checkpointing: bool = False,
) -> Tensor:
    """States after a range of the backbone's layers.

    Args:
        backbone: Owner of the layers, their rotary embedding and their config.
        states: Input of the first of the layers, shape (nodes, hidden).
        layers: Modules to run, in order.
        packing: Where texts stand in the states.
        call: How a layer is called, `call(layer, states, **kwargs)`; None calls it plainly.
        gradient_checkpointing: Recompute each layer in the backward pass instead of keeping its activations.

    Returns:
        States of the same shape.
    """
    call = call or (lambda layer, row, **kwargs: layer(row, **kwargs))
    call = _packed_call(call, backbone.config, attention_plan(packing, states.device))
    states, positions = states[None], packing.positions.to(states.device)[None]
    shared = {
        "attention_mask": None,
        "position_ids": positions,
        "position_embeddings": backbone.rotary_emb(states, position_ids=positions),
    }
    for layer in layers:
        # The name is bound anew, so that the input of the first layer, too, is gone when the second one runs.
        if gradient_checkpointing and torch.is_grad_enabled():
            states = checkpoint(call, layer, states, use_reentrant=False, **shared)
        else:
            states = call(layer, states, **shared)
    return states[0]


def _packed_call(
    call: Callable[..., Tensor], config: PreTrainedConfig, plan: AttentionPlan
) -> Callable[..., Tensor]:
    """`call` with attention by a plan: set for every layer, as gradient checkpointing calls layers again."""

    def packed(layer: nn.Module, rows: Tensor, **kwargs: Any) -> Tensor:
        with _use_attention(config, _PACKED):
            return call(layer, rows, plan=plan, **kwargs)

    return packed


@contextmanager
def _use_attention(config: PreTrainedConfig, name: str) -> Iterator[None]:
    before, config._attn_implementation = config._attn_implementation, name
    try:
        yield
    finally:
        config._attn_implementation = before


def _attend_packed(
    _: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    plan: AttentionPlan,
    **__: Any,
) -> tuple[Tensor, None]:
    """`packed_attention` as transformers calls attention."""
    return packed_attention(query, key, value, plan, scale=scaling), None


AttentionInterface.register(_PACKED, _attend_packed)
