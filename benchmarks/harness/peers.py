"""The same experts as PEFT adapters and as sequence-classification models, run as a good engineer would run them."""

import copy
from collections.abc import Iterator, Sequence

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
)
from trl import RewardConfig, RewardTrainer

from prefmoe.data.render import Encoded
from prefmoe.reward.model import DMoERMForSequenceClassification
from prefmoe.reward.settings import ExpertSettings

PADDING = 0  # no text holds it


def lora_config(
    *, rank: int, alpha: float, layers: range, target_modules: Sequence[str], **options: object
) -> LoraConfig:
    """LoRA on the same linear layers that carry our experts."""
    where = "|".join(map(str, layers))
    pattern = rf"(.*\.)?layers\.({where})\..*\.({'|'.join(target_modules)})"
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=pattern, lora_dropout=0.0, **options)


def as_peft_model(ours: DMoERMForSequenceClassification, backbone: PreTrainedModel) -> PeftModel:
    """A copy of the backbone with one adapter for each of our experts, named "0", "1", ..., of the same weights."""
    sizes = ours.config
    config = lora_config(
        rank=sizes.rank,
        alpha=sizes.alpha,
        layers=range(sizes.split_layer, len(backbone.layers)),
        target_modules=sizes.target_modules,
    )
    peer = get_peft_model(copy.deepcopy(backbone), config, adapter_name="0")
    for expert in range(1, ours.experts.num_experts):
        peer.add_adapter(str(expert), config)
    with torch.no_grad():
        for site, bank in ours.experts.sites.items():
            layer = peer.get_base_model().get_submodule(site.replace("/", "."))
            for expert in range(ours.experts.num_experts):
                layer.lora_A[str(expert)].weight.copy_(bank.A[expert])
                layer.lora_B[str(expert)].weight.copy_(bank.B[expert])
    return peer.requires_grad_(False).eval()


def new_classifier(backbone: PreTrainedModel) -> PreTrainedModel:
    """A sequence-classification model on a copy of the backbone, its head at random."""
    config = copy.deepcopy(backbone.config)
    config.num_labels, config.pad_token_id = 1, PADDING
    classifier = AutoModelForSequenceClassification.from_config(config, dtype=backbone.dtype)
    classifier.model.load_state_dict(backbone.state_dict())
    return classifier.to(backbone.device)


def as_sequence_classifier(
    ours: DMoERMForSequenceClassification, backbone: PreTrainedModel, expert: int = 0
) -> PreTrainedModel:
    """A whole model of its own that gives one expert's rewards: LoRA merged into the weights."""
    peer = new_classifier(backbone)
    with torch.no_grad():
        for site, bank in ours.experts.sites.items():
            linear = peer.model.get_submodule(site.replace("/", "."))
            linear.weight.add_(bank.delta_weight(expert).to(linear.weight))
        peer.score.weight.copy_(ours.experts.head_weight[expert])
    return peer.requires_grad_(False).eval()


def trl_trainer(
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sizes: ExpertSettings,
    pairs: Sequence[tuple[Encoded, Encoded]],
    folder: str,
    *,
    batch_pairs: int,
    **options: object,
) -> RewardTrainer:
    """TRL's RewardTrainer of one reward model: a classifier with LoRA of our size on our layers, for one epoch.

    Args:
        backbone: Copied.
        tokenizer: The backbone's.
        sizes: Of our experts.
        pairs: Chosen and rejected.
        folder: Where the Trainer writes.
        batch_pairs: Pairs a step.
        options: More of `RewardConfig`.
    """
    config = classifier_lora(sizes, len(backbone.layers))
    dataset = [
        {"chosen_ids": list(chosen.input_ids), "rejected_ids": list(rejected.input_ids)}
        for chosen, rejected in pairs
    ]
    arguments = RewardConfig(
        output_dir=folder,
        num_train_epochs=1,
        per_device_train_batch_size=batch_pairs,
        max_length=None,
        gradient_checkpointing=False,  # TRL's default; costs a third more time
        bf16=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=backbone.device.type == "cpu",
        **options,
    )
    trainer = RewardTrainer(
        model=new_classifier(backbone),
        args=arguments,
        train_dataset=Dataset.from_list(dataset),
        processing_class=tokenizer,
        peft_config=config,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def classifier_lora(sizes: ExpertSettings, num_layers: int) -> LoraConfig:
    """LoRA of our experts' size on their layers, for a sequence classifier."""
    return lora_config(
        rank=sizes.rank,
        alpha=sizes.alpha,
        layers=range(sizes.split_layer, num_layers),
        target_modules=sizes.target_modules,
        task_type="SEQ_CLS",
    )


def padded_batches(
    texts: Sequence[Encoded], max_tokens: int, device: torch.device, *, padding: int = PADDING
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """(texts, ids, mask): similar lengths together, padded on the right, within a budget of tokens."""
    lengths = [len(text.input_ids) for text in texts]
    left = sorted(range(len(texts)), key=lambda i: -lengths[i])
    while left:
        size = max(1, max_tokens // lengths[left[0]])
        members, left = left[:size], left[size:]
        rows = [torch.tensor(texts[i].input_ids) for i in members]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)
        mask = (torch.arange(ids.shape[1]) < torch.tensor([[len(row)] for row in rows])).long()
        yield members, ids.to(device), mask.to(device)


def last_states(states: Tensor, mask: Tensor) -> Tensor:
    """State of the last real token of every row, float32."""
    return states[torch.arange(len(states), device=states.device), mask.sum(1) - 1].float()


@torch.inference_mode()
def rewards_by_set_adapter(
    peer: PeftModel, heads: Tensor, texts: Sequence[Encoded], max_tokens: int
) -> Tensor:
    """One adapter after the other over all texts, switched once each; shape (texts, experts)."""
    rewards = torch.empty(len(texts), len(heads))
    for expert, head in enumerate(heads):
        peer.set_adapter(str(expert))
        for members, ids, mask in padded_batches(texts, max_tokens, heads.device):
            states = peer(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            rewards[members, expert] = (last_states(states, mask) @ head).cpu()
    return rewards


@torch.inference_mode()
def rewards_by_mixed_batch(
    peer: PeftModel, heads: Tensor, texts: Sequence[Encoded], max_tokens: int
) -> Tensor:
    """Every text once per adapter in one batch, by PEFT's `adapter_names`; shape (texts, experts)."""
    num_experts = len(heads)
    rewards = torch.empty(len(texts), num_experts)
    for members, ids, mask in padded_batches(texts, max(1, max_tokens // num_experts), heads.device):
        names = [str(expert) for expert in range(num_experts) for _ in members]
        mask = mask.repeat(num_experts, 1)
        output = peer(
            input_ids=ids.repeat(num_experts, 1),
            attention_mask=mask,
            adapter_names=names,
            use_cache=False,
        )
        last = last_states(output.last_hidden_state, mask)
        rewards[members] = torch.einsum("enh,eh->ne", last.unflatten(0, (num_experts, -1)), heads).cpu()
    return rewards


@torch.inference_mode()
def rewards_by_classifier(
    peer: PreTrainedModel | PeftModel, texts: Sequence[Encoded], max_tokens: int
) -> Tensor:
    """What one sequence-classification model says; shape (texts,)."""
    rewards = torch.empty(len(texts))
    padding = peer.config.pad_token_id  # by which the model finds the last token
    for members, ids, mask in padded_batches(texts, max_tokens, peer.device, padding=padding):
        rewards[members] = (
            peer(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 0].float().cpu()
        )
    return rewards
