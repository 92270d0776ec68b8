"""What the router reads is its slow form, and nothing behind the prompt."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from prefmoe.nn import router_features
from reference.routing import router_features as slow_features

lengths = st.lists(st.integers(1, 70), min_size=1, max_size=3)


def states_of(lengths):
    generator = torch.Generator().manual_seed(sum(lengths))
    return torch.randn(len(lengths), 70, 3, generator=generator, dtype=torch.float64)


@given(lengths)
def test_features_are_the_slow_form(lengths):
    states = states_of(lengths)
    slow = [slow_features(row, n) for row, n in zip(states.tolist(), lengths, strict=True)]
    torch.testing.assert_close(
        router_features(states, torch.tensor(lengths)), torch.tensor(slow, dtype=torch.float64)
    )


@given(lengths)
def test_what_stands_behind_the_prompt_changes_nothing(lengths):
    states = states_of(lengths)
    behind = torch.arange(70) >= torch.tensor(lengths)[:, None]
    changed = states.masked_fill(behind[..., None], 1e6)
    prompts = torch.tensor(lengths)
    assert torch.equal(router_features(states, prompts), router_features(changed, prompts))
