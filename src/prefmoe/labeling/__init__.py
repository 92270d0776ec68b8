"""Capability labels: which side of a pair is better on one named point, and who says so."""

from prefmoe.labeling.columns import ColumnLabeler
from prefmoe.labeling.interface import Labeler, Labels, apply_labels
from prefmoe.labeling.rules import RULES, Rule, RuleLabeler
from prefmoe.labeling.summary import LabelCounts, count_labels
from prefmoe.labeling.tasks import Capability, Task, TaskFile, load_tasks

__all__ = [
    "RULES",
    "Capability",
    "ColumnLabeler",
    "LabelCounts",
    "Labeler",
    "Labels",
    "Rule",
    "RuleLabeler",
    "Task",
    "TaskFile",
    "apply_labels",
    "count_labels",
    "load_tasks",
]
