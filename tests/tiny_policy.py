"""Tiny policies with a PMoL adapter whose every part is random, so that nothing is equal by being zero."""

import copy
import functools

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from prefmoe import PMoLConfig

GROUPS = {"a": 2, "b": 1}

# Every way to build an adapter that differs in its modules or in its forward pass.
CONFIGS: dict[str, dict[str, object]] = {
    "default": {},
    "linear scope": {"router_scope": "linear"},
    "model scope": {"router_scope": "model"},
    "recurrent": {"router": "recurrent", "router_size": 8},
    "top 1": {"top_k": 1},
    "no empty, top 2": {"empty_expert": False, "top_k": 2},
    "half empty": {"empty_mass": 0.5, "empty_loss_weight": 1.0},
    "hinge": {"group_loss": "hinge"},
    "lbc, switch": {"group_loss": "lbc", "balance_loss": "switch", "top_k": 2},
    "few layers": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2]},
}


@functools.cache
def _model(family: str, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if family == "gpt2":
        sizes |= {"n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 256}
    else:
        sizes |= {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
        }
        sizes |= {"num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 256}
    config = AutoConfig.for_model(family, **sizes)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def tiny_lm(family: str = "llama", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal language model of three layers; the same weights every time."""
    return copy.deepcopy(_model(family, dtype))


def pmol_config(**changes: object) -> PMoLConfig:
    """Two groups, three experts of rank 2."""
    return PMoLConfig(**{"groups": dict(GROUPS), "rank": 2, "task_type": "CAUSAL_LM"} | changes)


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Random values for whatever an adapter has trained or might have."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "pmol_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def tiny_policy(base: PreTrainedModel | None = None, *, seed: int = 0, **changes: object) -> PeftModel:
    """A policy in evaluation mode, its experts and routers random."""
    model = get_peft_model(tiny_lm() if base is None else base, pmol_config(**changes))
    randomize(model, seed)
    return model.eval()


def tokens(rows: int = 4, length: int = 9, seed: int = 0) -> torch.Tensor:
    """Ids, none of them special."""
    return torch.randint(3, 300, (rows, length), generator=torch.Generator().manual_seed(seed))
