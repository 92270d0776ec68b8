"""Configuration of a PMoL adapter, as PEFT has configurations, and the PEFT type it belongs to."""

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from peft import PeftConfig, PeftType
from peft.utils import CONFIG_NAME

from prefmoe.errors import ConfigError, PrefmoeWarning, join_problems
from prefmoe.nn import ExpertGroups
from prefmoe.policy.card import say_how_to_load
from prefmoe.suggest import nearest

RouterScope = Literal["linear", "block", "model"]
RouterKind = Literal["linear", "recurrent"]
GroupLoss = Literal["soft", "lbc", "hinge", "none"]
BalanceLoss = Literal["within_group", "switch", "none"]
LossSides = Literal["both", "chosen", "rejected"]

EMPTY = "empty"  # name of the empty expert, so no group's


def extend_peft_types() -> None:
    """Makes "PMOL" a member of PEFT's enum of methods, which has no other way in; once, and only if it is not there."""
    if "PMOL" in PeftType.__members__:
        return
    member: Any = str.__new__(PeftType, "PMOL")
    member._name_ = member._value_ = "PMOL"
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType)
    enum: Any = PeftType
    enum._member_names_.append("PMOL")
    enum._member_map_["PMOL"] = enum._value2member_map_["PMOL"] = member
    type.__setattr__(PeftType, "PMOL", member)


extend_peft_types()


@dataclass
class PMoLConfig(PeftConfig):
    """What a PMoL adapter looks like and what its routers are trained with.

    Args:
        groups: Experts of each preference, by name, such as `{"helpful": 2, "harmless": 2}`.
        rank: Of every expert.
        alpha: Scale of every expert; what it adds is multiplied by alpha / rank. Larger than for one LoRA, because
            the router's weights, about 1 / (experts + 1) at the start, come on top.
        target_modules: Linear layers that carry experts: names, a regular expression, or "all-linear" (all but the
            output layer).
        exclude_modules: Names, or a regular expression, of layers that carry none.
        layers_to_transform: Indices of the blocks that carry experts; None takes all.
        layers_pattern: Name of the list of blocks, where `layers_to_transform` needs it.
        modules_to_save: Further modules that are trained and saved whole.
        bias: Which biases of the model are trained: "none", "all", or "pmol_only".
        empty_expert: Whether a token may lean on an expert that adds nothing.
        empty_mass: Weight of the empty expert at the start, a fraction; None gives it as much as any expert.
        router_scope: A router for each "linear" layer, for each "block" (it sees what the block's first layer with
            experts sees), or one for the whole "model".
        router: "linear", or "recurrent": a GRU state is handed from block to block (needs router_scope "block").
        router_size: Width of that state.
        temperature: Divides the router's logits.
        top_k: Experts that a token uses; what the others would have goes to the empty expert. None uses all.
        group_loss: What ties groups to preferences: "soft" (KL to a smoothed target), "hinge" (share below a
            threshold), "lbc" (LoRAMoE's balance) or "none".
        group_loss_weight: Of the group loss beside the preference loss.
        group_smoothing: Share of the soft target that lies on the other groups.
        hinge_threshold: Share below which "hinge" pulls.
        lbc_delta: How unequal "lbc" makes the groups.
        group_loss_on: Which side of a pair the group loss looks at.
        balance_loss: "within_group" (experts of a group are used alike), "switch" (all experts are) or "none".
        balance_loss_weight: Of the balance loss.
        empty_loss_weight: Of the squared distance between the empty expert's mean weight and `empty_target`; 0 is off.
        empty_target: That weight, a fraction.

    Raises:
        ConfigError: Everything that cannot work, in one list.

    Example:
        >>> PMoLConfig(groups={"helpful": 2, "harmless": 2}).layout.num_choices
        5
    """

    groups: dict[str, int] = field(default_factory=dict)
    rank: int = 8
    alpha: float = 32.0
    target_modules: list[str] | set[str] | str | None = "all-linear"
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"
    empty_expert: bool = True
    empty_mass: float | None = None
    router_scope: RouterScope = "block"
    router: RouterKind = "linear"
    router_size: int = 128
    temperature: float = 1.0
    top_k: int | None = None
    group_loss: GroupLoss = "soft"
    group_loss_weight: float = 0.1
    group_smoothing: float = 0.1
    hinge_threshold: float = 0.6
    lbc_delta: float = 0.1
    group_loss_on: LossSides = "both"
    balance_loss: BalanceLoss = "within_group"
    balance_loss_weight: float = 0.01
    empty_loss_weight: float = 0.0
    empty_target: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PMOL
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list | tuple) else value)
        problems = [*_wrong_groups(self), *_wrong_names(self), *_wrong_numbers(self)]
        if problems:
            raise ConfigError(join_problems(problems))
        if len(self.groups) == 1 and self.group_loss != "none":
            warnings.warn(
                f"PMoL has one group, {next(iter(self.groups))!r}, so the group loss has nothing to tell apart and is "
                "switched off",
                PrefmoeWarning,
                stacklevel=3,
            )
            self.group_loss = "none"

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT does it when it saves an adapter; groups keep their order, and the model card says how to load it."""
        super().save_pretrained(save_directory, **kwargs)
        file = Path(save_directory) / CONFIG_NAME
        content = json.loads(file.read_text(encoding="utf-8"))
        # PEFT sorts what it writes, which would hand one group's experts to another.
        content["groups"] = self.groups
        file.write_text(json.dumps(content, indent=2), encoding="utf-8")
        say_how_to_load(Path(save_directory))

    @property
    def layout(self) -> ExpertGroups:
        """Which experts belong to which preference."""
        return ExpertGroups.of(self.groups, has_empty=self.empty_expert)


def _wrong_groups(config: PMoLConfig) -> list[str]:
    advice = "give the number of experts by preference, such as {'helpful': 2, 'harmless': 2}"
    if not isinstance(config.groups, dict):
        return [f"PMoLConfig: groups={config.groups!r} says not how many experts each has; {advice}"]
    if not config.groups:
        return [f"PMoLConfig: no groups; {advice}"]
    problems = [
        f"PMoLConfig: group {name!r} has {size!r} experts; every group needs 1 or more"
        for name, size in config.groups.items()
        if not isinstance(size, int) or size < 1
    ]
    if EMPTY in config.groups:
        problems.append(
            f"PMoLConfig: {EMPTY!r} is the name of the empty expert; call the group something else"
        )
    total = sum(size for size in config.groups.values() if isinstance(size, int))
    if config.top_k is not None and not problems and not 1 <= config.top_k <= total:
        problems.append(
            f"PMoLConfig: top_k={config.top_k}, but there are {total} experts; choose 1 to {total}"
        )
    return problems


def _wrong_names(config: PMoLConfig) -> list[str]:
    choices = {
        "router_scope": RouterScope,
        "router": RouterKind,
        "group_loss": GroupLoss,
        "group_loss_on": LossSides,
        "balance_loss": BalanceLoss,
    }
    problems = []
    for name, kind in choices.items():
        value, known = getattr(config, name), get_args(kind)
        if value not in known:
            meant = nearest(str(value), known)
            hint = f"; did you mean {meant!r}?" if meant else ""
            problems.append(f"PMoLConfig: {name}={value!r} is not one of {', '.join(known)}{hint}")
    if config.router == "recurrent" and config.router_scope != "block":
        problems.append(
            f"PMoLConfig: router='recurrent' hands its state from block to block; got "
            f"router_scope={config.router_scope!r}; choose 'block'"
        )
    return problems


def _wrong_numbers(config: PMoLConfig) -> list[str]:
    fraction, weight = (0.0, 1.0), (0.0, float("inf"))
    ranges: dict[str, tuple[float, float]] = {
        "rank": (1, float("inf")),
        "alpha": weight,
        "router_size": (1, float("inf")),
        "group_loss_weight": weight,
        "group_smoothing": fraction,
        "hinge_threshold": fraction,
        "lbc_delta": fraction,
        "balance_loss_weight": weight,
        "empty_loss_weight": weight,
        "empty_target": fraction,
    }
    problems = [
        f"PMoLConfig: {name}={getattr(config, name)}; expected {low:g} to {high:g}"
        for name, (low, high) in ranges.items()
        if not low <= getattr(config, name) <= high
    ]
    if config.temperature <= 0:
        problems.append(f"PMoLConfig: temperature={config.temperature}; expected a number above 0")
    if config.empty_mass is not None and not 0 < config.empty_mass < 1:
        problems.append(
            f"PMoLConfig: empty_mass={config.empty_mass}; expected a fraction above 0 and below 1"
        )
    if not config.empty_expert and (config.empty_mass is not None or config.empty_loss_weight):
        problems.append("PMoLConfig: empty_mass and empty_loss_weight need empty_expert=True")
    return problems
