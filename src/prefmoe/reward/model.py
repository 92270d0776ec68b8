"""The reward model: trunk once, router, the experts of the routed task, one reward and the reasons for it."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import ModelOutput

from prefmoe.backbone.layers import check_family, embed, new_backbone, run_layers
from prefmoe.backbone.packing import memory_in_tokens, pack_texts
from prefmoe.errors import ConfigError
from prefmoe.nn import (
    Packing,
    RoutingMode,
    TaskRouter,
    build_aggregator,
    pack_left,
    route,
    router_features,
)
from prefmoe.reward.artefact import ArtefactMixin
from prefmoe.reward.config import DMoERMConfig
from prefmoe.reward.experts import Experts


@dataclass
class RewardOutput(ModelOutput):
    """Rewards of a batch and why.

    Attributes:
        logits: Rewards, shape (batch, 1), float32; standardized within the task unless the config says otherwise.
        task_probs: Router's probabilities, shape (batch, tasks).
        task_ids: Task whose experts were used (most probable one with soft routing), shape (batch,).
        capability_scores: Standardized score of every capability of every task, shape (batch, capabilities) in the
            order of `model.capability_names`; NaN where the capability's task was not used.
        head_scores: Standardized score by the used task's own adapter, before aggregation, shape (batch,).
    """

    loss: Tensor | None = None
    logits: Tensor = None  # type: ignore[assignment]
    task_probs: Tensor = None  # type: ignore[assignment]
    task_ids: Tensor = None  # type: ignore[assignment]
    capability_scores: Tensor = None  # type: ignore[assignment]
    head_scores: Tensor = None  # type: ignore[assignment]


class TaskRewards(NamedTuple):
    """What the experts of one task say of some texts."""

    rewards: Tensor  # (texts,) standardized if the config says so
    scores: Tensor  # (texts, experts of the task) standardized


class DMoERMForSequenceClassification(ArtefactMixin, PreTrainedModel):
    """Double-layer mixture-of-experts reward model (Quan 2024, arXiv:2403.01197).

    Scoring runs the trunk (layers below `split_layer`) once per text, reads the task from the states of the prompt,
    and runs the upper layers once per text and expert of its task. What texts of a batch share from their first token
    on, such as a prompt, is run once for all of them. Padding is left out, so a text has the same reward with any.
    """

    config_class = DMoERMConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    _supports_sdpa = True
    supports_gradient_checkpointing = True

    def __init__(self, config: DMoERMConfig, backbone: PreTrainedModel | None = None) -> None:
        super().__init__(config.check())
        check_family(config.text_config, max_length=config.max_tokens)
        self.backbone = backbone if backbone is not None else new_backbone(config.text_config)
        self.backbone.requires_grad_(False)
        hidden, num_experts, num_tasks = (
            self.backbone.config.hidden_size,
            len(config.experts),
            len(config.tasks),
        )
        self.experts = Experts(
            self.backbone,
            num_experts=num_experts,
            num_dense=num_tasks if config.dense_tasks else 0,
            split_layer=config.split_layer,
            rank=config.rank,
            alpha=config.alpha,
            target_modules=config.target_modules,
            pooling=config.pooling,
        )
        if config.dense_tasks:
            owners = [config.task_names.index(task) for task, _ in config.experts]
            self.experts.dense_ids.copy_(torch.tensor(owners))
        self.experts.attach(self.backbone)
        self.router = TaskRouter(num_tasks=num_tasks, hidden=2 * hidden)  # see router_features
        self.aggregators = nn.ModuleList(
            build_aggregator(kind, num_experts=len(config.experts_of(task)), hidden=hidden)
            for task, kind in zip(config.tasks, config.aggregators, strict=True)
        )
        # Units in which the experts' outputs reach the aggregators, and in which rewards are given.
        self.register_buffer("state_mean", torch.zeros(num_experts, hidden))
        self.register_buffer("state_std", torch.ones(num_experts, hidden))
        self.register_buffer("score_mean", torch.zeros(num_experts))
        self.register_buffer("score_std", torch.ones(num_experts))
        self.register_buffer("reward_mean", torch.zeros(num_tasks))
        self.register_buffer("reward_std", torch.ones(num_tasks))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Every part starts as its own constructor says."""

    def train(self, mode: bool = True) -> Self:
        """Training mode for our parts only: the backbone is frozen, so its dropout and checkpointing stay off."""
        super().train(mode)
        self.backbone.eval()
        return self

    @property
    def capability_names(self) -> list[tuple[str, str]]:
        """(task, capability) of every column of `capability_scores`."""
        return [(task, name) for task, name in self.config.experts if name]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        prompt_lengths: Tensor | None = None,
        task_ids: Tensor | None = None,
        routing: RoutingMode = "top1",
        **_: Any,
    ) -> RewardOutput:
        """Rewards of whole texts (prompt and completion).

        Args:
            input_ids: Token ids, shape (batch, seq), padded on any side.
            attention_mask: 1 for real tokens; None if all are.
            prompt_lengths: Leading real tokens that belong to the prompt, shape (batch,); None looks for the last
                occurrence of the config's `response_marker`.
            task_ids: Known tasks, shape (batch,), for `routing="given"`.
            routing: "top1" takes the most probable task, "given" the one in `task_ids`, "soft" weights the
                standardized rewards of all tasks with the router's probabilities.

        Raises:
            ConfigError: `routing` is unknown, or "given" without `task_ids` or the other way round; or the chat
                template marks no end of the prompt and `prompt_lengths` are not given.
            ShapeError: a given task does not exist, or a row has no real token.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        input_ids, lengths = pack_left(input_ids, mask.bool())
        rows = zip(input_ids.tolist(), lengths.tolist(), strict=True)
        packing = pack_texts([row[:length] for row, length in rows], hidden=self.backbone.config.hidden_size)
        if prompt_lengths is None:
            self._check_that_prompts_can_be_found()
            prompt_lengths = find_prompt_lengths(input_ids, lengths, self.config.response_marker)
        return self.from_trunk(
            self.trunk(packing), packing, prompt_lengths, task_ids=task_ids, routing=routing
        )

    def _check_that_prompts_can_be_found(self) -> None:
        """A router that reads the answer too, or a mean over the prompt too, would be wrong without a word."""
        is_needed = len(self.config.tasks) > 1 or self.config.pooling == "mean"
        if is_needed and not self.config.response_marker:
            raise ConfigError(
                "the chat template writes nothing before an answer, so the end of the prompt cannot be found in "
                "token ids; pass prompt_lengths, or score texts with RewardModel"
            )

    def trunk(self, packing: Packing) -> Tensor:
        """States (nodes, hidden) after the shared lower layers."""
        layers = self.backbone.layers[: self.config.split_layer]
        with torch.no_grad():
            states = embed(self.backbone, packing.tokens.to(self.backbone.device))
            return run_layers(self.backbone, states, layers, packing)

    def from_trunk(
        self,
        trunk: Tensor,
        packing: Packing,
        prompt_lengths: Tensor,
        *,
        task_ids: Tensor | None = None,
        routing: RoutingMode = "top1",
        max_tokens: int | None = None,
    ) -> RewardOutput:
        """Rewards from trunk states.

        Args:
            trunk: States (nodes, hidden).
            packing: Where the texts stand in them.
            prompt_lengths: As in `forward`.
            task_ids: As in `forward`.
            routing: As in `forward`.
            max_tokens: Tokens that the upper layers run at once, of as many experts as that allows (one at least);
                None runs all experts of a task at once.
        """
        logits = self.router(router_features(packing.unpack(trunk), prompt_lengths))
        routed = route(logits, mode=routing, given=task_ids)
        every = list(range(len(self.config.tasks)))
        asked = [every if routing == "soft" else [task] for task in routed.task_ids.tolist()]
        rewards = trunk.new_zeros(len(asked), len(every), dtype=torch.float32)
        scores = rewards.new_full((len(asked), len(self.config.experts)), torch.nan)
        for task_id, task in enumerate(self.config.tasks):
            texts = [text for text, wanted in enumerate(asked) if task_id in wanted]
            if texts:
                states = self._task_states(
                    trunk, packing, prompt_lengths, task=task, texts=texts, max_tokens=max_tokens
                )
                said = self.task_rewards(task_id, states)
                rewards[texts, task_id] = said.rewards
                scores[torch.tensor(texts)[:, None], torch.tensor(self.config.experts_of(task))] = said.scores
        capabilities = scores[:, [row for row, (_, name) in enumerate(self.config.experts) if name]]
        heads = torch.tensor(
            [self.config.experts_of(task)[0] for task in self.config.tasks], device=scores.device
        )
        return RewardOutput(
            logits=(rewards * routed.weights).sum(-1, keepdim=True),
            task_probs=routed.probs,
            task_ids=routed.task_ids,
            capability_scores=capabilities,
            head_scores=scores.gather(1, heads[routed.task_ids, None])[:, 0],
        )

    def _task_states(
        self,
        trunk: Tensor,
        packing: Packing,
        starts: Tensor,
        *,
        task: str,
        texts: list[int],
        max_tokens: int | None,
    ) -> Tensor:
        """Pooled states (texts, experts of the task, hidden) of some texts of the packing."""
        nodes = packing.nodes()
        part = pack_texts([nodes[text] for text in texts], hidden=trunk.shape[1])
        experts = self.config.experts_of(task)
        size = memory_in_tokens(len(part.tokens), int(part.lengths.sum()))
        at_once = len(experts) if max_tokens is None else max(1, max_tokens // size)
        states = []
        for first in range(0, len(experts), at_once):
            ids = experts[first : first + at_once]
            found = self.experts.states(
                self.backbone, trunk, part.copies(ids), starts[texts].repeat(len(ids))
            )
            states.append(found.unflatten(0, (len(ids), len(texts))))
        return torch.cat(states).transpose(0, 1)

    def task_rewards(self, task_id: int, states: Tensor) -> TaskRewards:
        """Aggregates the pooled states (texts, experts of the task, hidden) of one task's experts."""
        ids = torch.tensor(self.config.experts_of(self.config.task_names[task_id]), device=states.device)
        scores = (states * self.experts.head_weight[ids]).sum(-1) + self.experts.head_bias[ids]
        scores = (scores - self.score_mean[ids]) / self.score_std[ids]
        states = (states - self.state_mean[ids]) / self.state_std[ids]
        return TaskRewards(self.in_units(self.aggregators[task_id](states, scores), task_id), scores)

    def in_units(self, rewards: Tensor, task_ids: int | Tensor) -> Tensor:
        """What aggregators give, in the units that rewards are given in: standardized if the config says so."""
        if not self.config.standardize:
            return rewards
        return (rewards - self.reward_mean[task_ids]) / self.reward_std[task_ids]


def find_prompt_lengths(token_ids: Tensor, lengths: Tensor, marker: list[int]) -> Tensor:
    """Tokens up to and including the last occurrence of the response marker; all tokens where there is none.

    Args:
        token_ids: Rows packed to the left, shape (batch, seq).
        lengths: Real tokens of every row, shape (batch,).
        marker: Token ids that the chat template writes before a completion.
    """
    if not marker or len(marker) > token_ids.shape[1]:
        return lengths.clone()
    pattern = torch.tensor(marker, device=token_ids.device)
    ends = torch.arange(len(marker), token_ids.shape[1] + 1, device=token_ids.device)
    found = (token_ids.unfold(1, len(marker), 1) == pattern).all(-1) & (ends <= lengths[:, None])
    last = torch.where(found, ends, 0).amax(-1)
    return torch.where(last > 0, last, lengths)


AutoModelForSequenceClassification.register(DMoERMConfig, DMoERMForSequenceClassification)
