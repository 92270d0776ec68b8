"""Consistency on Contrast Instructions: two close prompts, each with its own preferred completion."""

from typing import NamedTuple

from numpy.typing import ArrayLike

from prefmoe.errors import ShapeError
from prefmoe.evaluation.accuracy import Interval, bootstrap_interval, checked_row, pair_hits


class ContrastConsistency(NamedTuple):
    """Two fractions in [0, 1] with their intervals; 0.5 is chance.

    Attributes:
        c_res: Share of quadruples where the prompt's own completion beats the other prompt's.
        c_ins: Share of quadruples where the completion is worth more after its own prompt.
    """

    c_res: Interval
    c_ins: Interval


def contrast_consistency(
    own: ArrayLike, other_completion: ArrayLike, other_prompt: ArrayLike, *, seed: int
) -> ContrastConsistency:
    """C_res and C_ins of quadruples (x1, y1, x2, y2), where y1 is preferred after x1 and y2 after x2.

    Args:
        own: Rewards of y1 after its own prompt x1, shape (quadruples,).
        other_completion: Rewards of y2 after x1, shape (quadruples,).
        other_prompt: Rewards of y1 after x2, shape (quadruples,).
        seed: Seed of the bootstrap intervals.

    Raises:
        DataError: there are no quadruples, or a reward is not finite.
        ShapeError: the three are not equally long.

    Source:
        Shen et al. 2023, arXiv:2309.16155, section 3. Deviation: a tie counts one half; the release counts it
        as 0 in one script and as 1 in another.
    """
    base = checked_row(own, "rewards of the own completions")
    changed_completion = checked_row(other_completion, "rewards of the other completions")
    changed_prompt = checked_row(other_prompt, "rewards after the other prompts")
    lengths = (len(base), len(changed_completion), len(changed_prompt))
    if len(set(lengths)) != 1:
        raise ShapeError(f"contrast: the three rewards have {lengths} rows; expected one each a quadruple.")
    return ContrastConsistency(
        c_res=bootstrap_interval(pair_hits(base - changed_completion), seed=seed),
        c_ins=bootstrap_interval(pair_hits(base - changed_prompt), seed=seed),
    )
