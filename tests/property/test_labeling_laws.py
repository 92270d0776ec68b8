"""Laws of labels: blind to which side people chose, and the same for any text and any company."""

import math

from hypothesis import given
from hypothesis import strategies as st

from prefmoe.labeling import RULES, ColumnLabeler, RuleLabeler, apply_labels, count_labels
from prefmoe.records import Message, PreferencePair

TASKS = {"all": list(RULES), "few": {"brevity": "concise"}}
LOGARITHMS = {"concise", "informative", "specific", "structured", "mild", "no_instructions", "fluent"}

pieces = st.sampled_from(
    [*"Rivers flow sorry, I can't help you. What? 3.5 1,000 kill Tom’s 你好 🙂 \0 \n- 1) you can".split(" ")]
)
texts = st.one_of(st.lists(pieces, max_size=12).map(" ".join), st.text(max_size=30))
conversations = st.lists(
    st.builds(Message, st.sampled_from(["system", "user", "assistant"]), texts), min_size=1, max_size=3
).map(tuple)
completions = texts.map(lambda text: (Message("assistant", text),))
capabilities = st.dictionaries(st.sampled_from(["concise", "mild", "wit"]), st.sampled_from([1, 0, -1]))
pairs = st.builds(
    PreferencePair,
    st.just("p"),
    conversations,
    completions,
    completions,
    task=st.sampled_from(["all", "few", None]),
    capabilities=capabilities,
)


@given(conversations, completions)
def test_every_rule_gives_a_finite_value_or_none_for_any_text(prompt, completion):
    for name, rule in RULES.items():
        value = rule(prompt, completion)
        assert value is None or math.isfinite(value)
        assert value is None or name in LOGARITHMS or 0 <= value <= 1


@given(pairs)
def test_swapping_the_sides_flips_every_label(pair):
    labels, swapped = RuleLabeler(TASKS).label([pair, pair.swap()])
    assert swapped == {name: -side for name, side in labels.items()}


@given(conversations, completions)
def test_equal_sides_are_never_told_apart(prompt, completion):
    (labels,) = RuleLabeler(TASKS).label([PreferencePair("p", prompt, completion, completion, task="all")])
    assert set(labels.values()) <= {0}


@given(st.lists(pairs, max_size=4))
def test_a_pair_is_labelled_the_same_alone_and_in_company(many):
    labeler = RuleLabeler(TASKS)
    assert labeler.label(many) == [labels for pair in many for labels in labeler.label([pair])]


@given(st.lists(pairs, max_size=3))
def test_keeping_labels_is_trusting_the_columns_first(many):
    rules, columns = RuleLabeler(TASKS), ColumnLabeler.from_pairs(many)
    assert apply_labels(many, [rules]) == apply_labels(many, [columns, rules], keep_existing=False)


@given(st.lists(pairs, max_size=3))
def test_labelling_twice_changes_nothing_and_no_labeler_changes_nothing(many):
    once = apply_labels(many, [RuleLabeler(TASKS)])
    assert apply_labels(once, [RuleLabeler(TASKS)]) == once
    assert apply_labels(many, []) == many


@given(st.lists(pairs, max_size=5))
def test_counts_add_up_and_swapping_turns_agreement_around(many):
    counts = count_labels(many)
    swapped = count_labels([pair.swap() for pair in many])
    assert sum(c.chosen + c.rejected + c.ties for c in counts) == sum(len(p.capabilities) for p in many)
    assert [(c.chosen, c.rejected) for c in counts] == [(c.rejected, c.chosen) for c in swapped]
    assert all(0 <= c.separation <= 1 for c in counts)
