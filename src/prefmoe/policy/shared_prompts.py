"""Passes of a language model over texts that share prompts: each prompt once, logits of what is asked for only.

Chosen and rejected of a pair begin with the same prompt, whose states are the same in both. TRL computes them twice,
pads the shorter side and, where Triton does not run, the logits of all tokens. Here the texts lie as a prefix tree
in one row (`prefmoe.nn.Packing`), and the head sees the states that predict a completion's token; on a CPU it is ours
(`prefmoe.nn.token_logprobs`), where TRL's has no kernel and walks the logits a dozen times.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from trl import DPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from prefmoe.backbone.layers import check_family, embed, run_layers
from prefmoe.backbone.packing import pack_texts
from prefmoe.errors import ConfigError
from prefmoe.nn import Packing, token_logprobs
from prefmoe.policy.routing import AdapterRouting
from prefmoe.policy.tuner import PMoLModel


def share_prompts(trainer: DPOTrainer) -> DPOTrainer:
    """Lets a DPO trainer run the prompt of each pair once, without padding: the same losses and gradients, sooner.

    Call it after the trainer is made and before `train()`. A batch that cannot be shared (another family of models
    than the tested ones, padding on the left) runs as it always did.

    Args:
        trainer: TRL's, with a plain model or one with an adapter.

    Returns:
        The trainer.

    Example:
        trainer = share_prompts(connect_preferences(DPOTrainer(model, args=args, train_dataset=pairs, ...)))
    """
    for model in (trainer.model, trainer.ref_model):
        if model is not None:
            _share(trainer.accelerator.unwrap_model(model), wants_weighting=trainer.use_weighting)
    return trainer


def _share(model: nn.Module, *, wants_weighting: bool) -> None:
    """Replaces the forward pass that TRL gave a model's head; WPO's weights are TRL's to compute."""
    language_model = language_model_of(model)
    fused_forward = language_model.forward

    @functools.wraps(fused_forward)
    def forward(*args: Any, fused_lm_head: bool = False, labels: Tensor | None = None, **kwargs: Any) -> Any:
        texts = None
        if fused_lm_head and labels is not None and not args:
            texts = _right_padded(kwargs.get("input_ids"), kwargs.get("attention_mask"))
        if texts is None or labels is None or not can_share(model, longest=max(map(len, texts))):
            return fused_forward(*args, fused_lm_head=fused_lm_head, labels=labels, **kwargs)
        return _fused_on_tree(fused_forward, model, texts, labels, own_head=not wants_weighting)

    language_model.forward = forward


def language_model_of(model: nn.Module) -> PreTrainedModel:
    """The causal language model inside an adapter's wrappers."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def can_share(model: nn.Module, *, longest: int) -> bool:
    """Whether a model's passes over texts of at most `longest` tokens can share prompts."""
    language_model = language_model_of(model)
    config = language_model.config
    try:
        check_family(config, max_length=longest)
    except ConfigError:
        return False
    drops = model.training and getattr(config, "attention_dropout", 0.0) > 0
    steers_texts = any(
        routing.log_factors is not None and routing.log_factors.ndim == 3 for routing in _routings(model)
    )
    return not drops and not steers_texts


@contextmanager
def pass_over_tree(
    model: nn.Module, packing: Packing, kept: Tensor, *, with_head: bool = True
) -> Iterator[None]:
    """Inside, whatever ids the model is given, it runs a prefix tree; its head gets (1, kept nodes) states.

    Args:
        model: A causal language model, or one with an adapter, for which `can_share`.
        packing: The texts.
        kept: Nodes whose logits are wanted, in the order that they are wanted in.
        with_head: False leaves out the head: the model returns what that would get, as `last_hidden_state`.
    """
    decoder = language_model_of(model).base_model

    def forward(*_: Any, **__: Any) -> BaseModelOutputWithPast:
        for routing in _routings(model):
            routing.share(packing)
        states = run_layers(
            decoder,
            embed(decoder, packing.tokens.to(decoder.device)),
            decoder.layers,
            packing,
            call=_call_once,
            gradient_checkpointing=decoder.training and _recomputes(decoder.layers[0]),
        )
        wanted = decoder.norm(states).index_select(0, kept.to(decoder.device))
        return BaseModelOutputWithPast(last_hidden_state=wanted[None])

    with ExitStack() as replaced:
        replaced.enter_context(_forward_of(decoder, forward))
        if not with_head:
            replaced.enter_context(_forward_of(language_model_of(model), forward))
        yield


@contextmanager
def _forward_of(module: nn.Module, forward: Any) -> Iterator[None]:
    """Inside, a module has another forward pass; it may have been given one before, as TRL does it."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _call_once(layer: nn.Module, states: Tensor, **kwargs: Any) -> Tensor:
    """Calls a layer without its own gradient checkpointing, which would forget how its attention was set."""
    recomputes = _recomputes(layer)
    vars(layer)["gradient_checkpointing"] = False
    try:
        return layer(states, **kwargs)
    finally:
        vars(layer)["gradient_checkpointing"] = recomputes


def _recomputes(layer: nn.Module) -> bool:
    # transformers has renamed the model's own property, not the layer's attribute.
    return bool(vars(layer).get("gradient_checkpointing", False))


def pack_rows(model: nn.Module, texts: Sequence[Sequence[int]]) -> Packing:
    """The prefix tree of some texts for this model."""
    return pack_texts(texts, hidden=language_model_of(model).config.hidden_size)


def _fused_on_tree(
    fused_forward: Any, model: nn.Module, texts: list[list[int]], labels: Tensor, *, own_head: bool
) -> Any:
    """What TRL's forward with a fused head returns, (texts, seq - 1) a field, of a pass over the prefix tree."""
    packing = pack_rows(model, texts)
    targets = labels[:, 1:]
    is_target = targets != -100
    nodes = packing.rows[:, :-1].to(labels.device)[is_target]
    with pass_over_tree(model, packing, nodes):
        language_model = language_model_of(model)
        if own_head and has_plain_head(model) and _is_frozen(language_model.get_output_embeddings()):
            found = _logprobs_of_nodes(language_model, targets[is_target])
        else:
            found = fused_forward(fused_lm_head=True, shift_labels=targets[is_target][None])
    rows = {
        field.name: _as_rows(getattr(found, field.name), is_target) for field in dataclasses.fields(found)
    }
    return type(found)(**rows)


def has_plain_head(model: nn.Module) -> bool:
    """Whether `prefmoe.nn` can stand in for a model's head, and pays: on a CPU, where other ways waste memory."""
    head = language_model_of(model).get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None or torch.is_autocast_enabled("cpu"):
        return False
    return head.weight.device.type == "cpu"


def _is_frozen(head: nn.Module) -> bool:
    return not any(p.requires_grad for p in head.parameters())


def _logprobs_of_nodes(language_model: PreTrainedModel, targets: Tensor) -> FusedCausalLMOutput:
    states = language_model.base_model().last_hidden_state[0]  # inside `pass_over_tree`
    found = token_logprobs(states, language_model.get_output_embeddings().weight, targets)
    return FusedCausalLMOutput(
        loss=-found.logprobs.mean(),
        log_probs=found.logprobs[None],
        entropy=found.entropy[None],
        mean_logits=found.mean_logits[None],
        is_top1=found.is_top1[None],
        label_mask=torch.ones_like(found.is_top1)[None],
    )


def _as_rows(values: Tensor | None, is_target: Tensor) -> Tensor | None:
    if values is None or values.ndim == 0:
        return values
    return values.new_zeros(is_target.shape).masked_scatter(is_target, values[0])


def _right_padded(input_ids: Tensor | None, mask: Tensor | None) -> list[list[int]] | None:
    """Ids of every row without its padding; None if there is another kind of padding, or nothing to compute."""
    if input_ids is None or mask is None or mask.ndim != 2:
        return None
    lengths = mask.sum(dim=1)
    steps = torch.arange(mask.shape[1], device=mask.device)
    if (
        not torch.equal(mask.bool(), steps < lengths[:, None])
        or lengths.max() < mask.shape[1]
        or mask.shape[1] < 2
    ):
        return None
    return [row[:n] for row, n in zip(input_ids.tolist(), lengths.tolist(), strict=True)]


def _routings(model: nn.Module) -> list[AdapterRouting]:
    tuner = getattr(model, "base_model", None)
    return list(tuner.routings.values()) if isinstance(tuner, PMoLModel) else []
