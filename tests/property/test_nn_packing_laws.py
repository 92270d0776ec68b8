"""Laws of prefix trees: every text is in them once, and attends to itself and to nothing else."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from prefmoe.backbone.packing import pack_texts
from prefmoe.nn import attention_plan, packed_attention, saved_layer_tokens
from reference import packing as slow

WIDE = 10**6  # attention costs nothing beside the tokens: whatever can be shared is

tokens = st.integers(0, 2)  # few kinds, so that texts often begin alike
texts_and_owners = st.lists(
    st.tuples(st.lists(tokens, min_size=1, max_size=9), st.integers(0, 1)), min_size=1, max_size=7
).map(lambda drawn: tuple(map(list, zip(*drawn, strict=True))))
widths = st.sampled_from([1, WIDE])  # 1: nothing but a doubled text is worth sharing


@given(texts_and_owners, widths)
def test_every_text_stands_in_the_tree_in_order(drawn, hidden):
    texts, owners = drawn
    packing = pack_texts(texts, hidden=hidden, owners=owners)
    for text, nodes in zip(texts, packing.nodes(), strict=True):
        assert packing.tokens[nodes].tolist() == text
        assert packing.positions[nodes].tolist() == list(range(len(text)))
    states = packing.tokens[:, None].double()
    unpacked = packing.unpack(states)[..., 0]
    assert [row[: len(text)].tolist() for row, text in zip(unpacked, texts, strict=True)] == texts


@given(texts_and_owners, st.data())
def test_ends_of_texts_can_be_unpacked_alone(drawn, data):
    texts, owners = drawn
    packing = pack_texts(texts, hidden=WIDE, owners=owners)
    starts = [data.draw(st.integers(0, len(text) - 1)) for text in texts]
    ends = packing.unpack(packing.tokens[:, None].double(), torch.tensor(starts))[..., 0]
    assert ends.shape[1] == max(len(text) - start for text, start in zip(texts, starts, strict=True))
    for row, text, start in zip(ends, texts, starts, strict=True):
        assert row[: len(text) - start].tolist() == text[start:]


@given(texts_and_owners)
def test_a_tree_has_a_node_for_every_beginning_and_no_other(drawn):
    texts, owners = drawn
    packing = pack_texts(texts, hidden=WIDE, owners=owners)
    assert len(packing.tokens) == len(slow.prefixes(texts, owners))
    assert len(packing.tokens) == int((packing.lengths - packing.shared).sum())


@given(texts_and_owners, widths)
def test_nodes_lie_owner_by_owner(drawn, hidden):
    texts, owners = drawn
    packing = pack_texts(texts, hidden=hidden, owners=owners)
    assert [owner for owner, _ in packing.spans] == sorted(set(owners))
    of_node = [owner for owner, number in packing.spans for _ in range(number)]
    assert len(of_node) == len(packing.tokens)
    for nodes, owner in zip(packing.nodes(), owners, strict=True):
        assert {of_node[node] for node in nodes} == {owner}


@given(texts_and_owners)
def test_without_gain_texts_are_plain_rows(drawn):
    """Where attention costs most, only texts that are there twice are shared."""
    texts, owners = drawn
    packing = pack_texts(texts, hidden=1, owners=owners)
    shared = zip(packing.shared.tolist(), packing.lengths.tolist(), strict=True)
    assert all(saved_layer_tokens(s, n, hidden=1) > 0 for s, n in shared if s)


@given(texts_and_owners, st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True))
def test_copies_are_trees_of_their_own(drawn, owners):
    packing = pack_texts(drawn[0], hidden=WIDE)
    copies = packing.copies(owners)
    assert copies.spans == tuple((owner, len(packing.tokens)) for owner in owners)
    for copy in range(len(owners)):
        nodes = copies.nodes()[copy * len(packing.rows) : (copy + 1) * len(packing.rows)]
        assert nodes == [[copy * len(packing.tokens) + node for node in row] for row in packing.nodes()]
        for text, row in zip(drawn[0], nodes, strict=True):
            assert copies.tokens[row].tolist() == text
    assert sum(len(block.nodes) for block in attention_plan(copies)) == len(copies.tokens)


@given(texts_and_owners, widths)
def test_every_node_is_asked_for_once_and_sees_its_text_up_to_itself(drawn, hidden):
    packing = pack_texts(drawn[0], hidden=hidden, owners=drawn[1])
    plan = attention_plan(packing)
    assert sorted(torch.cat([block.nodes for block in plan]).tolist()) == list(range(len(packing.tokens)))
    beginnings = {tuple(nodes[: end + 1]) for nodes in packing.nodes() for end in range(len(nodes))}
    for block in plan:
        assert torch.equal(block.queries.flatten()[block.places], block.nodes)
        texts, new = block.queries.shape
        causal = (torch.arange(block.keys.shape[1]) <= torch.arange(new)[:, None]).expand(texts, 1, -1, -1)
        masks = (causal if block.mask is None else block.mask)[:, 0].flatten(0, 1)
        for node, place in zip(block.nodes.tolist(), block.places.tolist(), strict=True):
            seen = tuple(block.keys[place // new][masks[place]].tolist())
            assert seen in beginnings
            assert seen[-1] == node


@given(texts_and_owners, widths)
def test_texts_of_one_call_are_of_similar_length(drawn, hidden):
    packing = pack_texts(drawn[0], hidden=hidden, owners=drawn[1])
    padded = sum(block.queries.numel() for block in attention_plan(packing))
    assert padded <= 2 * len(packing.tokens)


@given(texts_and_owners, widths, st.sampled_from([1, 2]), st.integers(0, 99))
def test_packed_attention_equals_its_slow_twin(drawn, hidden, groups, seed):
    packing = pack_texts(drawn[0], hidden=hidden, owners=drawn[1])
    torch.manual_seed(seed)
    number, kv_heads, dim = len(packing.tokens), 2, 3
    query = torch.randn(1, kv_heads * groups, number, dim, dtype=torch.float64)
    key, value = torch.randn(2, 1, kv_heads, number, dim, dtype=torch.float64)
    fast = packed_attention(query, key, value, attention_plan(packing), scale=0.7)
    for nodes in packing.nodes():
        for head in range(kv_heads * groups):
            expected = slow.attention(
                query[0, head, nodes].tolist(),
                key[0, head // groups, nodes].tolist(),
                value[0, head // groups, nodes].tolist(),
                0.7,
            )
            torch.testing.assert_close(fast[0, nodes, head], torch.tensor(expected, dtype=torch.float64))


@given(st.integers(1, 300), st.integers(1, 1000), st.data())
def test_the_cost_model_equals_its_slow_twin(length, hidden, data):
    shared = data.draw(st.integers(1, length))
    expected = slow.saved_layer_tokens(shared, length, hidden)
    torch.testing.assert_close(saved_layer_tokens(shared, length, hidden), expected, rtol=1e-9, atol=1e-9)


@given(st.integers(2, 2000), st.sampled_from([64, 576, 4096]), st.data())
def test_more_in_common_saves_more_and_more_than_half_always_pays(length, hidden, data):
    shared = data.draw(st.integers(1, length - 1))
    assert saved_layer_tokens(shared + 1, length, hidden) > saved_layer_tokens(shared, length, hidden)
    if 2 * shared >= length:
        assert saved_layer_tokens(shared, length, hidden) >= shared
