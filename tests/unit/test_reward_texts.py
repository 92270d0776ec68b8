"""Texts once each, and pairs as numbers."""

import pytest

from data_helpers import CHATML, assistant, byte_tokenizer, make_pair
from prefmoe.data.render import Encoded, Renderer
from prefmoe.errors import DataError
from prefmoe.reward.texts import TextTable, encode_pairs


def renderer(max_length=200):
    return Renderer(byte_tokenizer(CHATML), max_length=max_length)


def test_equal_texts_are_one_row_of_the_table():
    table = TextTable()
    first = table.add(Encoded((1, 2, 3), 1, 0))
    other = table.add(Encoded((1, 2, 3), 2, 0))  # the same tokens, but the prompt ends elsewhere
    assert table.add(Encoded((1, 2, 3), 1, 0)) == first
    assert [first, other] == [0, 1]
    assert table.length(other) == 3


def test_the_key_of_a_text_is_its_tokens_and_nothing_else():
    table = TextTable()
    for ids, prompt in [((1, 23), 1), ((12, 3), 1), ((1, 23), 2), ((1, 2, 3), 1)]:
        table.add(Encoded(ids, prompt, 0))
    keys = [table.key(text) for text in range(4)]
    assert keys[0] == keys[2]
    assert len(set(keys)) == 3
    assert all(len(key) == 24 for key in keys)


def test_pairs_become_rows_in_order_with_what_is_known_of_them():
    table = TextTable()
    pairs = [make_pair("a", weight=2.0), make_pair("b", target_margin=0.5), make_pair("c", prompt="Other?")]
    encoded = encode_pairs(pairs, renderer(), table)
    assert [pair.id for pair in encoded.pairs] == ["a", "b", "c"]
    assert [(row.chosen, row.rejected) for row in encoded.rows] == [(0, 1), (0, 1), (2, 3)]
    assert [row.weight for row in encoded.rows] == [2.0, 1.0, 1.0]
    assert [row.target_margin for row in encoded.rows] == [0.0, 0.5, 0.0]
    assert encoded.rows[0].prompt == encoded.rows[1].prompt != encoded.rows[2].prompt
    assert (encoded.num_truncated, encoded.num_equal) == (0, 0)


def test_truncated_pairs_are_counted():
    pairs = [make_pair("short"), make_pair("long", prompt="x" * 300)]
    assert encode_pairs(pairs, renderer(60), TextTable()).num_truncated == 1


def equal_pair():
    return make_pair("same", chosen=assistant("y" * 300 + "a"), rejected=assistant("y" * 300 + "b"))


def test_sides_that_became_equal_are_refused_in_training_and_counted_in_evaluation():
    with pytest.raises(
        DataError, match="pair 'same': both sides are equal after truncation to max_length=60; raise"
    ):
        encode_pairs([make_pair(), equal_pair()], renderer(60), TextTable())
    encoded = encode_pairs([make_pair(), equal_pair()], renderer(60), TextTable(), allow_equal=True)
    assert encoded.num_equal == 1
    assert encoded.rows[1].chosen == encoded.rows[1].rejected


def test_all_pairs_that_cannot_be_used_are_named():
    pairs = [
        make_pair("empty", chosen=assistant("")),
        make_pair("good"),
        make_pair("blank", rejected=assistant(" ")),
    ]
    with pytest.raises(
        DataError, match=r"pair 'empty': the completion is empty.*\n.*pair 'blank': the completion"
    ):
        encode_pairs(pairs, renderer(), TextTable())


@pytest.mark.parametrize("text", ["🙂👩‍👩‍👧", "مرحبا بالعالم", "a\0b", "line\r\nline\u2028line"])
def test_any_text_can_be_encoded(text):
    table = TextTable()
    encode_pairs([make_pair(prompt=text, chosen=assistant(text))], renderer(), table)
    decoded = byte_tokenizer().decode(table.texts[0].input_ids)
    assert decoded.count(text) == 2
