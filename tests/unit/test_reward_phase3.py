"""Convex fits and aggregators on features made by hand."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from prefmoe.reward import aggregators, convex
from prefmoe.reward.aggregator_choice import Candidates, best_aggregators, fit_candidates
from prefmoe.reward.aggregators import (
    ExpertFeatures,
    fit_aggregator,
    join_features,
    standardized,
)
from prefmoe.reward.convex import fit_by_cross_validation
from prefmoe.reward.features import fit_head
from prefmoe.reward.settings import Phase3Settings
from prefmoe.reward.texts import PairRow

SETTINGS = Phase3Settings(mlp_epochs=20, mlp_learning_rate=3e-2)
GRID = (1.0, 0.1)


def pair_rows(number: int, *, per_prompt: int = 1) -> list[PairRow]:
    return [PairRow(2 * i, 2 * i + 1, prompt=i // per_prompt) for i in range(number)]


def differences(number: int = 40, features: int = 4, *, seed: int = 0) -> torch.Tensor:
    """The better side mostly has more of feature 0; the others are noise."""
    found = torch.randn(number, features, generator=torch.Generator().manual_seed(seed))
    found[:, 0] += 1.5
    return found


def test_a_fit_finds_what_separates() -> None:
    weights = fit_by_cross_validation(differences(), pair_rows(40))
    assert weights.abs().argmax() == 0
    assert (differences(400, seed=1) @ weights > 0).float().mean() > 0.85  # 0.93 is the best there is


def test_labels_say_which_side_is_better() -> None:
    rows = [row._replace(label=float(i % 2)) for i, row in enumerate(pair_rows(40))]
    signs = torch.tensor([1.0 if row.label else -1.0 for row in rows])
    turned = fit_by_cross_validation(differences() * signs[:, None], rows, grid=GRID)
    torch.testing.assert_close(turned, fit_by_cross_validation(differences(), pair_rows(40), grid=GRID))


def test_a_pair_of_no_weight_is_as_if_it_were_not_there() -> None:
    noise = torch.cat([differences(), -100 * differences(5, seed=3)])
    rows = [*pair_rows(40), *(row._replace(prompt=i % 40, weight=0.0) for i, row in enumerate(pair_rows(5)))]
    expected = fit_by_cross_validation(differences(), pair_rows(40), grid=GRID)
    torch.testing.assert_close(fit_by_cross_validation(noise, rows, grid=GRID), expected)


def test_features_that_say_nothing_get_the_strongest_penalty() -> None:
    noise = torch.randn(60, 30, generator=torch.Generator().manual_seed(5))
    noise = noise * torch.tensor([1.0, -1.0]).repeat(30)[:, None]
    rows = pair_rows(60)
    strongest = fit_by_cross_validation(noise, rows, grid=(100.0,))
    assert torch.equal(fit_by_cross_validation(noise, rows, grid=(100.0, 1e-4)), strongest)


def test_too_few_prompts_get_the_strongest_penalty() -> None:
    few = fit_by_cross_validation(differences(2), pair_rows(2), grid=(1e6, 1e-6))
    assert few.abs().max() < 1e-3
    many = fit_by_cross_validation(differences(), pair_rows(40), grid=(1e6, 1e-2))
    assert many.abs().max() > 0.1


def test_only_what_the_offset_leaves_is_explained() -> None:
    known = 5 * differences()[:, 0]  # decides every pair
    left = fit_by_cross_validation(differences(), pair_rows(40), known, grid=GRID)
    assert left.norm() < 0.5 * fit_by_cross_validation(differences(), pair_rows(40), grid=GRID).norm()


def test_pairs_of_a_prompt_stay_in_one_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pair_rows(40, per_prompt=4)
    marked = differences()
    marked[:, 1] = torch.tensor([float(row.prompt) for row in rows])
    seen: list[tuple[set[float], int]] = []
    fit = convex.fit_bradley_terry

    def recorded(features: torch.Tensor, **options: object) -> torch.Tensor:
        root = features.shape[1] ** 0.5
        seen.append(({round(v * root) for v in features[:, 1].tolist()}, len(features)))
        return fit(features, **options)

    monkeypatch.setattr(convex, "fit_bradley_terry", recorded)
    fit_by_cross_validation(marked, rows, grid=GRID)
    assert any(number < 40 for _, number in seen)
    assert all(number == 4 * len(prompts) for prompts, number in seen)


def test_a_head_does_not_depend_on_the_units_of_the_states() -> None:
    rejected = torch.randn(40, 4, generator=torch.Generator().manual_seed(9))
    chosen, units = rejected + differences(), torch.tensor([1.0, 100.0, 0.01, 5.0])
    head = fit_head(chosen, rejected, pair_rows(40))
    scaled = fit_head(chosen * units, rejected * units, pair_rows(40))
    torch.testing.assert_close(scaled * units, head, rtol=1e-3, atol=1e-5)


def test_a_head_of_states_that_are_all_equal_is_finite() -> None:
    assert fit_head(torch.ones(3, 4), torch.ones(3, 4), pair_rows(3)).isfinite().all()


def expert_features(
    number: int, *, good: int = 0, num_experts: int = 3, hidden: int = 4, seed: int = 0
) -> ExpertFeatures:
    """Experts of which one knows; the heads read state 0."""
    states = torch.randn(number, 2, num_experts, hidden, generator=torch.Generator().manual_seed(seed))
    states[:, 0, good, 0] += 3.0
    head = torch.zeros(num_experts, hidden)
    head[:, 0] = 1.0
    return standardized(states, head, torch.zeros(num_experts), pair_rows(number))


def test_standardized_features_have_unit_variance() -> None:
    features = expert_features(30)
    assert features.states.flatten(0, 1).mean(0).abs().max() < 1e-5
    torch.testing.assert_close(features.states.flatten(0, 1).std(0), torch.ones(3, 4))
    torch.testing.assert_close(features.scores.flatten(0, 1).std(0), torch.ones(3))


def test_features_of_no_pair_have_the_units_one_and_zero() -> None:
    features = expert_features(0)
    assert features.states.shape == (0, 2, 3, 4)
    assert torch.equal(features.units.state_std, torch.ones(3, 4))
    assert torch.equal(features.units.score_mean, torch.zeros(3))
    assert features.accuracy(fit("task_head", features)) == 0.5


def test_a_constant_expert_is_not_divided_by_zero() -> None:
    features = standardized(torch.ones(5, 2, 1, 4), torch.ones(1, 4), torch.zeros(1), pair_rows(5))
    assert features.states.isfinite().all()
    assert features.scores.isfinite().all()


def test_joined_features_keep_every_row_in_order() -> None:
    first, second = expert_features(3), expert_features(4, seed=1)
    joined = join_features([first, second])
    assert list(joined.rows) == [*first.rows, *second.rows]
    assert torch.equal(joined.states, torch.cat([first.states, second.states]))
    assert torch.equal(joined.scores, torch.cat([first.scores, second.scores]))
    assert joined.units is first.units


def fit(kind: str, features: ExpertFeatures, settings: Phase3Settings = SETTINGS) -> torch.nn.Module:
    return fit_aggregator(kind, features, settings=settings, seed=0)


@pytest.mark.parametrize("kind", ["linear_scores", "linear_states", "mlp"])
def test_an_aggregator_finds_the_expert_that_knows(kind: str) -> None:
    aggregator = fit(kind, expert_features(120, good=2))
    unseen = expert_features(60, good=2, seed=7)
    assert unseen.accuracy(aggregator) > 0.9  # 0.98 is the best there is
    assert unseen.accuracy(fit("task_head", unseen)) < 0.7


@pytest.mark.parametrize("kind", ["linear_scores", "linear_states"])
def test_one_pair_leaves_the_linear_aggregators_near_the_task_head(kind: str) -> None:
    few, unseen = expert_features(1, num_experts=3), expert_features(60, seed=7)
    assert unseen.accuracy(fit(kind, few)) == pytest.approx(unseen.accuracy(fit("task_head", few)), abs=0.05)


@pytest.mark.parametrize("kind", ["linear_scores", "linear_states", "mlp"])
def test_the_same_seed_gives_the_same_aggregator(kind: str) -> None:
    features = expert_features(20)
    one, two = (fit(kind, features).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_mlp_is_trained_on_everything_for_the_epochs_that_were_best_on_prompts_kept_from_a_first_try(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    features = expert_features(20)
    judged: list[int] = []
    said = iter([0.6, 0.9, 0.9, *[0.1] * 17])

    def accuracy(self: ExpertFeatures, aggregator: torch.nn.Module) -> float:
        judged.append(len(self.rows))
        return next(said)

    monkeypatch.setattr(ExpertFeatures, "accuracy", accuracy)
    kept = fit("mlp", features).state_dict()
    assert judged == [7] * 20  # a third of the prompts, after each of 20 epochs
    last = fit("mlp", features.part(torch.arange(20) < 2), SETTINGS.model_copy(update={"mlp_epochs": 2}))
    monkeypatch.setattr(aggregators, "prompt_folds", lambda rows: [])
    two = fit("mlp", features, SETTINGS.model_copy(update={"mlp_epochs": 2})).state_dict()
    assert all(torch.equal(kept[name], two[name]) for name in kept)
    assert any(not torch.equal(kept[name], other) for name, other in last.state_dict().items())


def test_flipped_labels_turn_the_aggregator() -> None:
    features = expert_features(60)
    flipped = replace(features, rows=[row._replace(label=0.0) for row in features.rows])
    assert features.accuracy(fit("linear_scores", features)) > 0.9
    assert features.accuracy(fit("linear_scores", flipped)) < 0.1


HEAD = torch.tensor([1.0, 0.0] * 50)
ALIKE = {"task_head": 0.5, "linear_scores": 0.5, "mlp": 0.5}


def changed(*, won: int, lost: int) -> torch.Tensor:
    """Hits of a kind that is right on `won` pairs more than the head, and wrong on `lost`."""
    hits = HEAD.clone()
    hits[1 : 2 * won : 2], hits[0 : 2 * lost : 2] = 1.0, 0.0
    return hits


def kept_of(
    hits: dict[str, torch.Tensor],
    *,
    validation: dict[str, float] = ALIKE,
    prompts: Sequence[int] | None = None,
    standard_errors: float = 1.0,
) -> str:
    """What the only task keeps by these hits, and by these shares of hits on validation pairs."""
    found = made_up(hits, validation=validation, prompts=prompts)
    return best_aggregators({"only": found}, standard_errors=standard_errors)["only"]


def made_up(
    hits: dict[str, torch.Tensor],
    *,
    validation: dict[str, float] = ALIKE,
    prompts: Sequence[int] | None = None,
) -> Candidates:
    modules = {kind: torch.nn.Identity() for kind in hits}
    prompts = range(len(hits["task_head"])) if prompts is None else prompts
    return Candidates(
        modules, hits, list(prompts), {kind: torch.tensor([share]) for kind, share in validation.items()}
    )


@pytest.mark.parametrize(
    ("hits", "kept"),
    [
        ({"task_head": HEAD, "mlp": changed(won=3, lost=2)}, "task_head"),
        ({"task_head": HEAD, "mlp": changed(won=3, lost=2), "linear_scores": changed(won=20, lost=0)}, "linear_scores"),
        ({"task_head": HEAD, "mlp": changed(won=30, lost=0), "linear_scores": changed(won=20, lost=0)}, "mlp"),
        ({"task_head": HEAD, "mlp": HEAD}, "task_head"),
        ({"task_head": HEAD[1:2], "mlp": HEAD[:1]}, "task_head"),
    ],
    ids=["luck", "better", "best of two", "equal", "one pair"],
)  # fmt: skip
def test_the_task_head_is_kept_unless_another_beats_it_by_more_than_a_standard_error(hits, kept) -> None:
    assert kept_of(hits) == kept


def test_more_standard_errors_ask_for_a_larger_gain() -> None:
    """Twenty won and ten lost of a hundred: a gain of 0.10 with a standard error of 0.054."""
    hits = {"task_head": HEAD, "linear_scores": changed(won=20, lost=10)}
    assert [kept_of(hits, standard_errors=number) for number in (0, 1.8, 1.9)] == [
        "linear_scores",
        "linear_scores",
        "task_head",
    ]


def test_what_the_finished_experts_speak_against_is_not_taken() -> None:
    """The best of two gains most, but not where it will be used."""
    hits = {"task_head": HEAD, "mlp": changed(won=30, lost=0), "linear_scores": changed(won=20, lost=0)}
    assert kept_of(hits, validation={**ALIKE, "mlp": 0.49}) == "linear_scores"
    assert kept_of(hits, validation={**ALIKE, "task_head": 0.51}) == "task_head"
    assert kept_of(hits, validation={**ALIKE, "mlp": 0.9}) == "mlp"


def test_pairs_of_one_prompt_are_one_draw() -> None:
    """Twenty pairs won and ten lost are a gain; one prompt won and one lost are none."""
    hits = {"task_head": HEAD, "linear_scores": changed(won=20, lost=10)}
    assert kept_of(hits) == "linear_scores"
    won_or_lost = (hits["linear_scores"] - HEAD).tolist()
    together = [100 + int(change) if change else i for i, change in enumerate(won_or_lost)]
    assert kept_of(hits, prompts=together) == "task_head"


@pytest.mark.parametrize(
    ("standard_errors", "gain", "least", "most"),
    [
        (1, -0.03, 0.0, 0.02),
        (1, 0.0, 0.1, 0.22),
        (1, 0.05, 0.95, 1.0),
        (2, 0.0, 0.005, 0.05),
        (2, 0.05, 0.8, 0.93),
    ],
    ids=["noise that harms", "noise", "a real gain", "noise, strict", "a real gain, strict"],
)
def test_noise_loses_to_the_task_head_and_a_real_gain_wins(
    standard_errors: float, gain: float, least: float, most: float
) -> None:
    """Aggregators that judge a tenth of 400 pairs otherwise than the head: how many of 500 are kept.

    The standard error of the difference is 0.016; a normal variable exceeds one in 0.16 and two in 0.02 of cases.
    """
    generator = torch.Generator().manual_seed(0)
    kept = 0
    for _ in range(500):
        head = (torch.rand(400, generator=generator) < 0.5).float()
        drawn = torch.rand(400, generator=generator)
        # A fifth of the pairs is judged anew; half of them come out as the head judged them.
        other = head.where(drawn >= 0.2, (drawn < 0.1 + gain).float())
        kept += kept_of({"task_head": head, "mlp": other}, standard_errors=standard_errors) == "mlp"
    assert least <= kept / 500 <= most


def test_a_gain_too_small_for_one_task_is_found_on_all_of_them() -> None:
    """Seven won and three lost of a hundred: a gain of 0.04 with a standard error of 0.031, of five tasks 0.014."""
    found = made_up({"task_head": HEAD, "linear_scores": changed(won=7, lost=3)})
    assert best_aggregators({"only": found}, standard_errors=2.0) == {"only": "task_head"}
    tasks = [f"task {i}" for i in range(5)]
    assert best_aggregators(dict.fromkeys(tasks, found), standard_errors=2.0) == dict.fromkeys(
        tasks, "linear_scores"
    )


def test_a_kind_that_is_let_in_is_kept_where_it_has_most_hits() -> None:
    gains = {"task_head": HEAD, "linear_scores": changed(won=30, lost=0), "mlp": changed(won=20, lost=0)}
    loses = {"task_head": HEAD, "linear_scores": changed(won=1, lost=2), "mlp": HEAD}
    other = {"task_head": HEAD, "linear_scores": changed(won=9, lost=8), "mlp": changed(won=12, lost=8)}
    tasks = {name: made_up(hits) for name, hits in {"a": gains, "b": loses, "c": other}.items()}
    kept = best_aggregators(tasks, standard_errors=1.0)
    assert kept == {"a": "linear_scores", "b": "task_head", "c": "mlp"}


def test_prompts_of_two_tasks_are_not_one_draw() -> None:
    """As numbers of prompts are hashes, equal ones are equal prompts; a task is a reason to draw them apart."""
    one = made_up({"task_head": HEAD, "mlp": changed(won=4, lost=0)}, prompts=[0] * 50 + [1] * 50)
    assert best_aggregators({"a": one}, standard_errors=1.0) == {"a": "task_head"}
    assert best_aggregators({"a": one, "b": one, "c": one}, standard_errors=1.0)["a"] == "mlp"


def test_a_task_where_nothing_was_judged_keeps_its_head_and_has_no_say() -> None:
    silent = Candidates({"task_head": torch.nn.Identity()}, {}, [], {"task_head": torch.tensor([])})
    gains = made_up({"task_head": HEAD, "mlp": changed(won=30, lost=0)})
    assert best_aggregators({"a": silent, "b": gains}, standard_errors=2.0) == {"a": "task_head", "b": "mlp"}
    assert best_aggregators({"a": silent}, standard_errors=2.0) == {"a": "task_head"}


EVERY_KIND = {"kinds": ["task_head", "linear_scores", "linear_states", "mlp"]}


def kept_by(found: Candidates) -> str:
    return best_aggregators({"only": found}, standard_errors=1.0)["only"]


def candidates_of(features: ExpertFeatures, *, good: int = 0, **changes: object) -> Candidates:
    """Candidates of a task whose validation pairs are decided by expert `good`."""
    settings = SETTINGS.model_copy(update={"kinds": ["task_head", "linear_scores"], **changes})
    validation = expert_features(20, good=good, num_experts=features.scores.shape[-1], seed=8)
    return fit_candidates(features, validation, settings=settings, seed=0)


def test_a_pair_is_judged_by_an_aggregator_that_has_not_seen_its_prompt() -> None:
    """Labels that are pure chance: fitted and judged on the same pairs, eight experts would look better than 0.5."""
    features = expert_features(60, good=0, num_experts=8)
    noise = torch.randn(features.scores.shape, generator=torch.Generator().manual_seed(3))
    features = replace(features, scores=noise, states=torch.zeros_like(features.states))
    found = candidates_of(features)
    same_pairs = features.accuracy(found.modules["linear_scores"])
    assert found.hits["linear_scores"][:60].mean() < same_pairs


@pytest.mark.parametrize("seed", range(3))
def test_what_speaks_for_any_kind_is_chance_where_labels_are_chance(seed: int) -> None:
    """As many numbers as pairs: whatever has seen a pair's label, such as the finished head, would be right on it."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(120, 2, 2, 120, generator=generator)
    features = standardized(states, torch.randn(2, 120, generator=generator), torch.zeros(2), pair_rows(120))
    found = fit_candidates(
        features, features.part(torch.zeros(120) > 0), settings=SETTINGS.model_copy(update=EVERY_KIND), seed=0
    )
    for kind, hits in found.hits.items():
        assert abs(hits.mean().item() - 0.5) < 0.14, kind  # three standard errors
    seen = features.accuracy(found.modules["linear_states"])
    assert seen > 0.75


def test_the_finished_experts_have_no_say_on_pairs_kept_back() -> None:
    """They have seen those pairs; what they are enters by their features of validation pairs alone."""
    features = expert_features(60, good=2)
    found = [candidates_of(features, good=good, **EVERY_KIND).hits for good in (0, 2)]
    for kind in found[0]:
        assert torch.equal(found[0][kind][:60], found[1][kind][:60])
        assert not torch.equal(found[0][kind][60:], found[1][kind][60:])


def test_validation_pairs_are_judged_beside_those_kept_back() -> None:
    found = candidates_of(expert_features(60), good=2)
    assert [len(hits) for hits in found.hits.values()] == [80, 80]
    for kind, hits in found.hits.items():
        assert hits[60:].mean().item() == pytest.approx(found.validation[kind].mean().item())
    # In the order of the folds: every third prompt first.
    assert found.prompts == [*range(0, 60, 3), *range(1, 60, 3), *range(2, 60, 3), *range(20)]


def test_the_expert_that_knows_is_found_on_pairs_kept_back() -> None:
    found = candidates_of(expert_features(60, good=2), good=2, **EVERY_KIND)
    assert kept_by(found) != "task_head"


def test_a_gain_that_the_finished_experts_do_not_show_is_no_gain() -> None:
    """An aggregator that is right on pairs kept back by experts of a fold, and wrong with those of the model."""
    features = expert_features(12, good=2)
    kinds = {good: candidates_of(features, good=good) for good in (0, 2)}
    kept = {good: kept_by(found) for good, found in kinds.items()}
    assert kept == {0: "task_head", 2: "linear_scores"}


@pytest.mark.parametrize("seed", range(5))
def test_capabilities_that_say_nothing_leave_the_task_head(seed: int) -> None:
    found = candidates_of(expert_features(90, good=0, seed=seed), **EVERY_KIND)
    assert kept_by(found) == "task_head"


def test_too_few_prompts_leave_the_task_head() -> None:
    found = candidates_of(expert_features(2))
    assert list(found.modules) == ["task_head"]
    assert found.hits == {}
