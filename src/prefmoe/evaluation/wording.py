"""What methods and phases are called where people read, and what they do, in one sentence each."""

from typing import NamedTuple


class Wording(NamedTuple):
    """A name for people and one sentence of explanation."""

    name: str
    meaning: str


METHODS = {
    "single": Wording("Single reward model", "One adapter, trained on the pairs of all tasks together."),
    "single_wide": Wording(
        "Single, wide", "As the single reward model, with one adapter as large as all experts together."
    ),
    "per_task": Wording("Per-task adapters", "One adapter for each task, trained on the pairs of that task."),
    "dmoerm": Wording(
        "DMoERM",
        "The mixture: a router picks the task, the capability experts of that task look at the completion, "
        "and an aggregator makes one reward of what they see.",
    ),
}

PHASES = {
    "train_router": Wording("Router", "Learns to tell from the prompt which task it belongs to."),
    "train_task_adapters": Wording(
        "Task adapters", "One adapter a task learns which of two completions people prefer."
    ),
    "train_capability_experts": Wording(
        "Capability experts", "Each expert learns one capability of one task, from labels of that capability."
    ),
    "train_aggregator": Wording(
        "Aggregator", "Learns to make one reward out of what the experts of a task say."
    ),
}


def method_name(method: str) -> str:
    """The name of a method for people; a method we do not know keeps its own."""
    return METHODS[method].name if method in METHODS else method


def phase_wording(phase: str) -> Wording:
    """Name and meaning of a training phase; a phase we do not know keeps its name."""
    return PHASES.get(phase, Wording(phase, ""))
