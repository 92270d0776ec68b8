"""What a DMoERM reward model is made of, as a transformers config."""

import copy
from importlib import import_module
from typing import Any, Self

from transformers import AutoConfig, PreTrainedConfig

from prefmoe.errors import ConfigError
from prefmoe.nn import AggregatorKind

TASK_EXPERT = ""


class DMoERMConfig(PreTrainedConfig):
    """Shape and origin of a DMoERM reward model.

    Experts are numbered task by task; the first expert of a task is its task adapter, the others are its
    capabilities in the order given here.

    Args:
        text_config: Config of the backbone, already cut to its first layers.
        method: What it was trained as, such as "single_wide"; None in models saved before this was written.
        backbone: Where the frozen weights come from: a folder, a GGUF file, a known name or a hub id.
        backbone_hash: Hash of the frozen weights that the experts were trained on.
        includes_backbone: True if the saved folder holds the frozen weights too.
        tasks: For every task the names of its capabilities, possibly none.
        split_layer: First layer with experts; the layers below are the shared trunk.
        rank: LoRA rank of every expert.
        alpha: LoRA scale times rank.
        target_modules: Linear layers that carry experts, by the last part of their name.
        dense_tasks: True if every task also owns a full-size delta of the target layers (`phase1.method: full`).
        pooling: "last" takes the state of the last token, "mean" the mean over the completion's tokens.
        aggregators: Kind of aggregator of every task.
        standardize: Whether rewards are given in standard deviations around the task's mean.
        max_tokens: Longest text; not called max_length, which transformers keeps for generation.
        chat_template: Template that the model was trained with.
        template_hash: Hash of the rendering (`Renderer.template_hash`), checked by scorers.
        response_marker: Token ids that end every prompt; finds the prompt in bare token ids.
    """

    model_type = "dmoerm"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012  (the form transformers reads)

    def __init__(  # noqa: PLR0913  (a config is the list of its settings)
        self,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        *,
        method: str | None = None,
        backbone: str | None = None,
        backbone_hash: str | None = None,
        includes_backbone: bool = False,
        tasks: dict[str, list[str]] | None = None,
        split_layer: int = 0,
        rank: int = 8,
        alpha: float = 16.0,
        target_modules: list[str] | None = None,
        dense_tasks: bool = False,
        pooling: str = "last",
        aggregators: list[AggregatorKind] | None = None,
        standardize: bool = True,
        max_tokens: int = 1024,
        chat_template: str | None = None,
        template_hash: str | None = None,
        response_marker: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        # A copy: transformers writes the attention of this model into it, which must not reach a live backbone.
        self.text_config: Any = copy.deepcopy(text_config)
        self.method = method
        self.backbone = backbone
        self.backbone_hash = backbone_hash
        self.includes_backbone = includes_backbone
        self.tasks = {task: list(names) for task, names in (tasks or {}).items()}
        self.split_layer = split_layer
        self.rank = rank
        self.alpha = alpha
        self.target_modules = list(target_modules or ["q_proj", "v_proj", "up_proj", "down_proj"])
        self.dense_tasks = dense_tasks
        self.pooling = pooling
        self.aggregators: list[AggregatorKind] = list(aggregators or ["task_head"] * len(self.tasks))
        self.standardize = standardize
        self.max_tokens = max_tokens
        self.chat_template = chat_template
        self.template_hash = template_hash
        self.response_marker = list(response_marker or [])
        kwargs.setdefault("num_labels", 1)
        kwargs.setdefault("problem_type", "regression")  # vLLM then returns the raw reward, not a sigmoid
        super().__init__(**kwargs)
        import_module(
            "prefmoe.reward.model"
        )  # registers the model: who has our config can load it (register.py)

    @property
    def task_names(self) -> list[str]:
        """Tasks in the router's order."""
        return list(self.tasks)

    @property
    def experts(self) -> list[tuple[str, str]]:
        """(task, capability) of every expert in bank order; capability "" is the task adapter."""
        return [(task, name) for task, names in self.tasks.items() for name in [TASK_EXPERT, *names]]

    def experts_of(self, task: str) -> list[int]:
        """Bank rows of one task: its task adapter first, then its capabilities."""
        return [row for row, (owner, _) in enumerate(self.experts) if owner == task]

    def check(self) -> Self:
        """Raises ConfigError for a shape that cannot be built; returns itself."""
        if self.text_config is None or not self.tasks:
            raise ConfigError("DMoERMConfig: text_config and at least one task are needed")
        layers = self.text_config.num_hidden_layers
        if not 0 <= self.split_layer < layers:
            raise ConfigError(
                f"split_layer={self.split_layer} leaves no layer for experts; choose 0 to {layers - 1} for a "
                f"backbone of {layers} layers"
            )
        if self.pooling not in ("last", "mean"):
            raise ConfigError(f"pooling={self.pooling!r} is unknown; choose 'last' or 'mean'")
        if len(self.aggregators) != len(self.tasks):
            raise ConfigError(
                f"{len(self.aggregators)} aggregators for {len(self.tasks)} tasks; name one a task"
            )
        return self


AutoConfig.register(DMoERMConfig.model_type, DMoERMConfig)
