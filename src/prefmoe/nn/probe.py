"""Convex fits of linear heads: one optimum, found the same way every time, no learning rate."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from prefmoe.errors import ConfigError, DataError, ShapeError
from prefmoe.nn.losses import bradley_terry_loss, weighted_mean
from prefmoe.shapes import Rewards

Features = Float[Tensor, "rows features"]
_MAX_ITERATIONS = 300


def fit_bradley_terry(
    differences: Float[Tensor, "pairs features"],
    *,
    l2: float,
    weight: Rewards | None = None,
    label: Rewards | None = None,
    offset: Rewards | None = None,
) -> Float[Tensor, " features"]:
    r"""Weights $w$ of the linear reward $w \cdot x$ that explains preference pairs best.

    The minimum of $\overline{\ell}(w) + \frac{\lambda}{2} \lVert w \rVert^2$, where $\overline{\ell}$
    is the weighted mean of `bradley_terry_loss` over the pairs, in nats.

    Args:
        differences: Features of the chosen completion minus those of the rejected one. Standardize features
            first, or `l2` means something else for each.
        l2: Strength $\lambda$ of the pull to 0, above 0: then there is exactly one minimum, separable
            data included.
        weight: Share of each pair in the mean, at least 0. None means 1.
        label: Probability in [0, 1] that the chosen completion is better. None means 1.
        offset: Margin of each pair that is given already, in nats; $w$ explains what it leaves. None means 0.

    Returns:
        The weights, in the dtype of `differences`, without gradient.

    Raises:
        ConfigError: `l2` is not above 0.
        DataError: `differences` hold values that are not finite.

    Numerics:
        L-BFGS with strong-Wolfe line search in float64 from 0; deterministic.

    Source:
        L2-regularized logistic regression without intercept. Slow form: tests/reference/probe.py.

    Example:
        >>> weights = fit_bradley_terry(torch.tensor([[2.0, 0.0], [1.0, 0.0]]), l2=0.1)
        >>> bool(weights[0] > 1), weights[1].item()
        (True, 0.0)
    """
    _check_inputs("fit_bradley_terry", differences, l2)
    features = differences.detach().double()
    given = features.new_zeros(len(features)) if offset is None else offset.detach().double()
    weight = None if weight is None else weight.detach().double()
    label = None if label is None else label.detach().double()

    def objective(solution: Tensor) -> Tensor:
        margins = features @ solution + given
        fit = bradley_terry_loss(margins, torch.zeros_like(margins), weight=weight, label=label)
        return fit + l2 / 2 * solution.square().sum()

    return _minimize(objective, features.new_zeros(features.shape[1])).to(differences.dtype)


def fit_softmax(
    features: Features,
    labels: Int[Tensor, " rows"],
    *,
    num_classes: int,
    l2: float,
    label_smoothing: float = 0.05,
    class_balance: float = 1.0,
    has_bias: bool = True,
) -> tuple[Float[Tensor, "classes features"], Float[Tensor, " classes"]]:
    r"""Weights and biases of the linear classifier with the least regularized cross-entropy.

    The minimum of $\overline{\ell}(W, b) + \frac{\lambda}{2} (\lVert W \rVert^2 + \lVert b \rVert^2)$, where
    $\overline{\ell}$ is the mean cross-entropy in nats against $(1 - \epsilon)$ on the label plus
    $\epsilon / \text{classes}$ on every class.

    Args:
        features: Rows to classify; standardize them first.
        labels: Class of each row, from 0 to num_classes - 1.
        num_classes: Number of classes; a class without rows is allowed and gets the smallest bias.
        l2: Strength $\lambda$, above 0. It holds the biases too, so there is exactly one minimum.
        label_smoothing: $\epsilon$, in [0, 1).
        class_balance: $a$; a row of a class of $n$ counts $n^{-a}$: with 1 all classes count the same, with 0 all rows.
        has_bias: Whether $b$ is fitted, too; otherwise it is 0.

    Returns:
        Weights (classes, features) and biases (classes,), in the dtype of `features`, without gradient.

    Raises:
        ConfigError: `l2` is not above 0.
        DataError: `features` hold values that are not finite.
        ShapeError: A label is not a class.

    Numerics:
        L-BFGS with strong-Wolfe line search in float64 from 0; deterministic.

    Source:
        Multinomial logistic regression; smoothing: Szegedy et al. 2016, arXiv:1512.00567, section 7.
        Slow form: tests/reference/probe.py.

    Example:
        >>> weights, biases = fit_softmax(
        ...     torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1]), num_classes=2, l2=0.1
        ... )
        >>> bool(weights[0, 0] < 0 < weights[1, 0])
        True
    """
    _check_inputs("fit_softmax", features, l2)
    _check_labels("fit_softmax", labels, num_classes)
    inputs = F.pad(features.detach().double(), (0, 1), value=float(has_bias))
    counts = torch.bincount(labels, minlength=num_classes).double()
    row_weight = counts[labels] ** -class_balance

    def objective(solution: Tensor) -> Tensor:
        logits = inputs @ solution.T
        losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
        return weighted_mean(losses, row_weight) + l2 / 2 * solution.square().sum()

    solution = _minimize(objective, inputs.new_zeros(num_classes, inputs.shape[1])).to(features.dtype)
    return solution[:, :-1].contiguous(), solution[:, -1].contiguous()


def _check_inputs(where: str, features: Tensor, l2: float) -> None:
    if not l2 > 0:
        raise ConfigError(f"{where}: l2 has to be above 0 so that there is one minimum; got {l2}; try 0.001.")
    if not features.isfinite().all():
        raise DataError(f"{where}: features hold nan or inf; drop those rows or look for what made them.")


def _check_labels(where: str, labels: Tensor, num_classes: int) -> None:
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        raise ShapeError(f"{where}: unknown label; got {wrong[0].item()}; expected 0 to {num_classes - 1}.")


@torch.enable_grad()
def _minimize(objective: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Where a smooth, strongly convex function is smallest."""
    solution = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [solution],
        max_iter=_MAX_ITERATIONS,
        tolerance_grad=1e-7,
        tolerance_change=0.0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        value = objective(solution)
        (solution.grad,) = torch.autograd.grad(value, solution)
        return value.detach()

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return solution.detach()
