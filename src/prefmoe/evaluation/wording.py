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
    "other": Wording("Other model", "What it was compared with, trained by the same method."),
}

PHASES = {
    "shared": Wording("Shared start", "One adapter on the pairs of all tasks, from which the others start."),
    "single_wide": Wording(
        "Single, wide", "One adapter as large as all experts together, on the pairs of all tasks."
    ),
    "phase1": Wording(
        "Phase 1: task adapters", "One adapter a task learns which of two completions people prefer."
    ),
    "phase2": Wording(
        "Phase 2: capability experts",
        "Each expert learns one capability of one task, from labels of that capability.",
    ),
}

STEPS = {
    "backbone": "Tiny backbone of the demo",
    "trunk": "Shared lower layers, all texts",
    "router": "Router",
    "phase3": "Phase 3: aggregators, with the states of the held-out pairs",
    "best_of_n": "Best of n",
    "score": "Scoring",
}

AGGREGATORS = {
    "task_head": "task adapter alone",
    "linear_scores": "weighted scores",
    "linear_states": "linear on states",
    "mlp": "small network",
}


def method_name(method: str) -> str:
    """The name of a method for people; a method we do not know keeps its own."""
    return METHODS[method].name if method in METHODS else method


def step_name(step: str) -> str:
    """The name of a timed step of a run for people; a step we do not know keeps its own."""
    kind, _, rest = step.partition("_")
    if kind == "features" and rest:
        return f"Experts' states, {method_name(rest) if rest in METHODS else f'held-out pairs ({rest})'}"
    if kind == "test" and rest:
        return f"Test pairs, {method_name(rest)}"
    return STEPS.get(step) or phase_wording(step).name


def phase_wording(phase: str) -> Wording:
    """Name and meaning of a training phase; a phase we do not know keeps its name."""
    return PHASES.get(phase, Wording(phase, ""))
