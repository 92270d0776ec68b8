"""Routers that begin as classifiers: what they then say of texts, before anything is trained."""

import pytest
import torch
from peft import get_peft_model

from prefmoe.nn import ExpertGroups, TokenRouter, group_log_masses
from prefmoe.policy import router_start
from prefmoe.policy.inspect import inspect_routing
from prefmoe.policy.layer import PMoLLinear
from prefmoe.policy.pairs import Text, TokenPair, TokenPairs
from prefmoe.policy.router_start import _fit as fit
from prefmoe.policy.router_start import fit_router_starts, start_routers
from tiny_policy import pmol_config, tiny_lm


def texts(num: int, seed: int = 0) -> tuple[list[Text], list[str]]:
    """Random prompts; completions of "a" and "b" have four words each."""
    generator = torch.Generator().manual_seed(seed)
    made, names = [], []
    for index in range(num):
        name = "ab"[index % 2]
        first, last = (10, 14) if name == "a" else (20, 24)
        prompt = torch.randint(3, 300, (4,), generator=generator).tolist()
        completion = torch.randint(first, last, (5 + index % 3,), generator=generator).tolist()
        made.append(Text(tuple(prompt), tuple(completion)))
        names.append(name)
    return made, names


def untrained(family: str = "llama", **changes):
    torch.manual_seed(0)
    return get_peft_model(tiny_lm(family), pmol_config(**changes)).eval()


def group_accuracy(model, *, seed: int) -> float:
    made, names = texts(40, seed)
    return inspect_routing(model, made, names).hits.mean().item()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"router_scope": "linear"},
        {"router_scope": "model"},
        {"temperature": 0.2},
        {"empty_expert": False},
    ],
    ids=str,
)
def test_other_texts_are_told_apart_before_any_step(changes):
    model = untrained(**changes)
    before = group_accuracy(model, seed=1)
    start_routers(model, fit_router_starts(model, *texts(120)))
    assert before < 0.8
    assert group_accuracy(model, seed=1) > 0.9


@pytest.mark.parametrize("temperature", [1.0, 0.2])
def test_experts_of_a_group_begin_alike_and_the_empty_one_with_nothing(temperature):
    model = untrained(temperature=temperature)
    starts = fit_router_starts(model, *texts(30))
    start_routers(model, starts)
    routing = model.base_model.routings["default"]
    layers = [m for m in model.modules() if isinstance(m, PMoLLinear) and "default" in m.pmol_router]
    assert sorted(starts) == sorted(layer.sites["default"].name for layer in layers)
    for layer in layers:
        router = layer.pmol_router["default"]
        assert isinstance(router, TokenRouter)
        rows = starts[layer.sites["default"].name]
        x = torch.randn(7, router.weight.shape[1])
        masses = group_log_masses(router(x), routing.groups, temperature=temperature)
        # Two experts of "a" and one of "b": the classifier's odds, twice for "a".
        expected = (x @ rows.T + torch.tensor([2.0, 1.0]).log()).log_softmax(dim=1)
        torch.testing.assert_close(masses, expected, rtol=1e-4, atol=1e-5)
        assert router(x)[:, -1].abs().max() == 0


def test_shared_prompts_and_padding_see_the_same(monkeypatch):
    made, names = texts(30)
    shared = fit_router_starts(untrained(), made, names, batch_tokens=64)
    monkeypatch.setattr("prefmoe.policy.logps.can_share", lambda *_, **__: False)
    plain = fit_router_starts(untrained(), made, names, batch_tokens=64)
    assert shared.keys() == plain.keys()
    for name, rows in shared.items():
        torch.testing.assert_close(rows, plain[name], rtol=1e-2, atol=1e-3 * float(rows.abs().max()))


def test_noise_is_met_with_the_stronger_penalty():
    """Where preferences are drawn by lot, what is fitted has to stay near nothing; where they are plain, not."""
    made, names = texts(120)
    generator = torch.Generator().manual_seed(3)
    lots = ["ab"[i] for i in torch.randint(0, 2, (len(made),), generator=generator).tolist()]
    noise, truth = (fit_router_starts(untrained(), made, labels) for labels in (lots, names))
    for name, rows in truth.items():
        assert noise[name].norm() < 0.3 * rows.norm()


def test_routers_that_see_the_same_are_fitted_once_and_as_if_each_were_alone(monkeypatch):
    made, names = texts(40)
    number = {}
    for kind, distinct in {
        "once": router_start._distinct,
        "each": lambda features: [([name], rows) for name, rows in features.items()],
    }.items():
        fits = []
        monkeypatch.setattr(router_start, "_distinct", distinct)
        monkeypatch.setattr(router_start, "_fit", lambda *a, fits=fits, **k: fits.append(0) or fit(*a, **k))
        model = untrained(router_scope="linear", target_modules="all-linear")
        starts = fit_router_starts(model, made, names)
        number[kind] = (len(fits), starts)
    (once, shared), (each, alone) = number["once"], number["each"]
    # Four of seven: what attention, its output, the MLP and its output see. Three penalties are tried on every fifth.
    fitted = (len(alone) * 4 // 7, len(alone))
    assert (once, each) == tuple(routers + 3 * -(-routers // 5) for routers in fitted)
    assert shared.keys() == alone.keys()
    assert all(torch.equal(rows, alone[name]) for name, rows in shared.items())


def test_the_penalty_is_chosen_on_more_than_one_kind_of_layer(monkeypatch):
    heard = set()

    def loss(features, *_):
        heard.update(names[0].rsplit(".", 1)[1] for names, _ in features)
        return 0.0

    monkeypatch.setattr(router_start, "_held_out_loss", loss)
    fit_router_starts(untrained(router_scope="linear", target_modules="all-linear"), *texts(20))
    assert len(heard) > 1


def test_some_tokens_of_many_texts_are_enough(monkeypatch):
    monkeypatch.setattr("prefmoe.policy.router_start._MAX_TEXTS", 50)
    model, seen = untrained(), []
    model.base_model.routings["default"].listeners.append(lambda records, batch: seen.append(len(batch.mask)))
    made, names = texts(120)
    # By threes, so that every third text still has both preferences.
    start_routers(model, fit_router_starts(model, made, names))
    assert sum(seen) == 40
    assert group_accuracy(model, seed=1) > 0.9


@pytest.mark.parametrize(("max_rows", "expected"), [(8000, 6), (120, 4)])
def test_the_fewer_the_texts_the_more_tokens_of_each(monkeypatch, max_rows, expected):
    rows = []
    monkeypatch.setattr(router_start, "_MAX_ROWS", max_rows)
    monkeypatch.setattr(
        router_start, "_fit", lambda x, *_, **__: rows.append(len(x)) or torch.zeros(2, x.shape[1])
    )
    made, names = texts(30)
    fit_router_starts(untrained(), [Text(t.prompt_ids, (*t.completion_ids, 9)[:6]) for t in made], names)
    assert rows[-1] == 30 * expected


def test_chosen_and_rejected_are_taken_in_turn():
    rows = [TokenPair((i,), (10 + i,), (20 + i,), "a", str(i)) for i in range(3)]
    taken = TokenPairs(rows).one_side()
    assert [text.completion_ids for text in taken] == [(10,), (21,), (12,)]
    assert [text.prompt_ids for text in taken] == [(0,), (1,), (2,)]


def test_the_model_is_left_without_hooks():
    model = untrained()
    fit_router_starts(model, *texts(4))
    assert all(not m._forward_pre_hooks for m in model.modules() if isinstance(m, PMoLLinear))
    assert model.base_model.routings["default"].groups == ExpertGroups(("a", "b"), (2, 1))
