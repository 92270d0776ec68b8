"""Tiny random models, built from a config in milliseconds: no hub, no downloads."""

from dataclasses import replace

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from prefmoe.nn import Packing
from prefmoe.reward.config import DMoERMConfig
from prefmoe.reward.model import DMoERMForSequenceClassification

TASKS = {"advice": ["empathy", "warmth"], "facts": [], "writing": ["rhythm"]}


def tiny_backbone(
    family: str = "llama",
    *,
    layers: int = 4,
    hidden: int = 32,
    vocab: int = 300,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> PreTrainedModel:
    """A random decoder of a family; 300 ids are enough for the byte tokenizer of data_helpers."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        family,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return AutoModel.from_config(config, dtype=dtype).requires_grad_(False).eval()


def tiny_language_model(
    *, layers: int = 2, hidden: int = 32, vocab: int = 300, seed: int = 0
) -> PreTrainedModel:
    """A random causal language model, for policies."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def tiny_reward_model(
    backbone: PreTrainedModel | None = None, *, seed: int = 0, **changes: object
) -> DMoERMForSequenceClassification:
    """A reward model on a tiny backbone whose every trained part is random, not zero."""
    backbone = backbone or tiny_backbone()
    settings: dict[str, object] = {
        "tasks": TASKS,
        "split_layer": 2,
        "rank": 2,
        "response_marker": [5, 6],
    } | changes
    model = DMoERMForSequenceClassification(DMoERMConfig(backbone.config, **settings), backbone=backbone)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not name.startswith("backbone.") and tensor.is_floating_point() and not name.endswith("_std"):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
        # As after a fit: features of about one, so that texts and not the bias decide the task.
        model.router.mean.zero_()
        model.router.std.fill_(0.02)
        model.router.bias.zero_()
    return model.eval()


def in_place(packing: Packing) -> Packing:
    """The same tree over its own states: every node is its own number."""
    return replace(packing, tokens=torch.arange(len(packing.tokens)))
