"""Our reward model with random experts, and how it is asked: as `RewardModel` and `prefmoe reward score` do it."""

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from prefmoe.backbone.layers import load_backbone
from prefmoe.data.render import Encoded
from prefmoe.reward.config import DMoERMConfig
from prefmoe.reward.model import DMoERMForSequenceClassification
from prefmoe.reward.score import score_texts
from prefmoe.reward.texts import TextTable
from prefmoe.reward.trunk import Trunk
from prefmoe.runs.precision import resolve_dtype


def add_model_options(parser: argparse.ArgumentParser, *, num_layers: int, split_layer: int) -> None:
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--num-layers", type=int, default=num_layers, help="first ones kept; 0: all")
    parser.add_argument("--split-layer", type=int, default=split_layer)
    parser.add_argument("--batch-tokens", type=int, default=8192, help="of one forward pass, for everybody")
    parser.add_argument("--smoke", action="store_true", help="a tiny random model: does it run at all")


def backbone_of(arguments: argparse.Namespace, device: torch.device) -> PreTrainedModel:
    """The backbone that the options name; with `--smoke` a tiny random one of as many layers."""
    dtype = resolve_dtype(arguments.dtype, device)
    num_layers = arguments.num_layers or None
    if not arguments.smoke:
        return load_backbone(arguments.model, num_layers=num_layers, dtype=dtype).to(device)
    torch.manual_seed(0)
    config = tiny_config(num_layers or 4)
    return AutoModel.from_config(config, dtype=dtype).requires_grad_(False).eval().to(device)


def tiny_config(num_layers: int) -> PreTrainedConfig:
    return AutoConfig.for_model(
        "llama",
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )


def random_reward_model(
    backbone: PreTrainedModel,
    *,
    experts: int,
    split_layer: int,
    tasks: int = 1,
    rank: int = 8,
    target_modules: Sequence[str] = ("q_proj", "k_proj", "v_proj", "o_proj"),
) -> DMoERMForSequenceClassification:
    """Tasks of so many experts each, all with random weights, so that each expert gives another reward.

    Pooled by the last token, as sequence-classification models do it, so that they can be compared. Not attached to
    the given backbone but to a copy.
    """
    config = DMoERMConfig(
        backbone.config,
        tasks={
            f"task {task}": [f"capability {number}" for number in range(1, experts)] for task in range(tasks)
        },
        split_layer=split_layer,
        rank=rank,
        target_modules=list(target_modules),
        pooling="last",
        max_tokens=1 << 20,
    )
    model = DMoERMForSequenceClassification(config).to(backbone.dtype)
    model.backbone.load_state_dict(backbone.state_dict())
    model.experts.float(), model.router.float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for bank in model.experts.sites.values():
            bank.B.copy_(torch.randn(bank.B.shape, generator=generator) * 0.02)
        heads = model.experts.head_weight
        heads.copy_(torch.randn(heads.shape, generator=generator) / heads.shape[1] ** 0.5)
    model.experts.store_in(backbone.dtype)  # as `RewardModel.load` does
    return model.requires_grad_(False).eval().to(backbone.device)


def expert_rewards(
    model: DMoERMForSequenceClassification, texts: Sequence[Encoded], batch_tokens: int
) -> Tensor:
    """What the experts of each text's task say of it, by our own scoring; tasks take turns from text to text.

    Returns:
        Shape (texts, 1 + all capabilities): the task adapter first; NaN for capabilities of other tasks.
    """
    table = TextTable()
    numbers = [table.add(text) for text in texts]
    trunk = Trunk(model.backbone, model.config.split_layer, table, batch_tokens=batch_tokens)
    task_ids = [row % len(model.config.tasks) for row in range(len(texts))]
    scores = score_texts(model, trunk, numbers, routing="given", task_ids=task_ids)
    return torch.cat([scores.rewards[:, None], scores.capabilities], dim=1)


def bare_pass(backbone: PreTrainedModel, seq: int, batch_tokens: int) -> tuple[Callable[[], object], int]:
    """The backbone alone on a dense full batch, and how many layer-tokens that is: the speed that counts as 1."""
    rows = max(1, batch_tokens // seq)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, backbone.config.vocab_size, (rows, seq), generator=generator).to(backbone.device)

    @torch.inference_mode()
    def run() -> object:
        return backbone(input_ids=ids, use_cache=False)

    return run, ids.numel() * len(backbone.layers)
