"""Laws of the data layer, for any text."""

import json
import random
from collections import defaultdict
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_helpers import CHATML, assistant, byte_tokenizer, make_pair, row, user
from prefmoe.data.check import check_files
from prefmoe.data.fields import has_text
from prefmoe.data.parse import parse_row
from prefmoe.data.read import read_pairs
from prefmoe.data.render import Renderer
from prefmoe.data.split import folds_by_prompt, prompt_key, split_by_prompt
from prefmoe.records import Message

laws = settings(max_examples=60, deadline=None, derandomize=True)
TOKENIZER = byte_tokenizer(CHATML)
WIDE = Renderer(TOKENIZER, max_length=10**6)

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)
filled = texts.filter(lambda text: has_text(user(text)))
tricky = st.lists(st.sampled_from(["<|im_end|>", "<|im_start|>", "<s>", "\ufdd0", "0", "system\n", "a"])).map(
    "".join
)
pairs = st.lists(
    st.builds(
        make_pair,
        prompt=st.integers(0, 12).map(str),
        task=st.sampled_from([None, "a", "b"]),
    ),
    max_size=40,
)
turns = st.lists(filled | tricky.filter(bool), min_size=1, max_size=6)


def conversation(contents, system):
    """Contents as system message (perhaps), then user and assistant in turns."""
    opening = (Message("system", "Be brief."),) if system else ()
    return opening + tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(contents))


@laws
@given(pairs=pairs, seed=st.integers(0, 9), shares=st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_split_is_complete_disjoint_and_blind_to_order(pairs, seed, shares):
    fractions = {f"part{index}": share / sum(shares) for index, share in enumerate(shares)}
    parts = split_by_prompt(pairs, fractions, seed=seed)
    assert sorted(map(id, chain.from_iterable(parts.values()))) == sorted(map(id, pairs))
    part_of_prompt = defaultdict(set)
    for name, part in parts.items():
        for pair in part:
            part_of_prompt[prompt_key(pair.prompt)].add(name)
    assert all(len(names) == 1 for names in part_of_prompt.values())
    shuffled = random.Random(0).sample(pairs, len(pairs))
    again = split_by_prompt(shuffled, fractions, seed=seed)
    assert {name: set(map(id, part)) for name, part in again.items()} == {
        name: set(map(id, part)) for name, part in parts.items()
    }


@laws
@given(pairs=pairs, num_folds=st.integers(2, 5), seed=st.integers(0, 9))
def test_folds_hold_whole_prompts_and_differ_by_no_more_than_the_largest_prompt(pairs, num_folds, seed):
    folds = folds_by_prompt(pairs, num_folds, seed=seed)
    fold_of = {}
    for pair, fold in zip(pairs, folds, strict=True):
        assert 0 <= fold < num_folds
        assert fold_of.setdefault(pair.prompt, fold) == fold
    if len({pair.task for pair in pairs}) == 1:
        sizes = [folds.count(fold) for fold in range(num_folds)]
        largest = max(sum(pair.prompt == prompt for pair in pairs) for prompt in fold_of)
        assert max(sizes) - min(sizes) <= largest


@laws
@given(prompt=filled, chosen=filled, rejected=filled, escaped=st.booleans())
def test_write_then_read_is_the_identity(tmp_path_factory, prompt, chosen, rejected, escaped):
    path = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    values = row(prompt=prompt, chosen=chosen, rejected=rejected + "!" * (chosen == rejected))
    path.write_bytes(json.dumps(values, ensure_ascii=escaped).encode())
    (pair,) = read_pairs(path)
    assert {name: getattr(pair, name)[0].content for name in values} == values


@laws
@given(good=st.lists(st.booleans(), min_size=1, max_size=30))
def test_check_reports_every_planted_error_with_its_line(tmp_path_factory, good):
    path = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row() if ok else row(chosen="")) + "\n" for ok in good))
    report = check_files({"train": path})
    assert [problem.line for problem in report.problems] == [
        line for line, ok in enumerate(good, 1) if not ok
    ]
    assert report.num_pairs == {"train": sum(good)}


@laws
@given(scores=st.dictionaries(st.sampled_from("abc"), st.tuples(st.integers(-2, 2), st.integers(-2, 2))))
def test_swapping_the_columns_swaps_the_pair(scores):
    def columns(first, second):
        names = {f"cap_{name}_{first}": one for name, (one, _) in scores.items()}
        return names | {f"cap_{name}_{second}": other for name, (_, other) in scores.items()}

    (pair,) = parse_row(
        {**row(chosen="x", rejected="y"), **columns("chosen", "rejected")}, row_id="1", problems=[]
    )
    (other,) = parse_row(
        {**row(chosen="y", rejected="x"), **columns("rejected", "chosen")}, row_id="1", problems=[]
    )
    assert other == pair.swap()


@laws
@given(contents=turns, system=st.booleans(), answer=filled, max_length=st.integers(13, 300))
def test_truncation_keeps_the_completion_and_counts_what_it_cut(contents, system, answer, max_length):
    prompt, completion = conversation(contents, system), assistant(answer)
    rendering = Renderer(TOKENIZER, max_length=max_length)
    full, cut = WIDE.encode(prompt, completion), rendering.encode(prompt, completion)
    assert len(cut.input_ids) == len(full.input_ids) - cut.truncated_tokens <= max_length
    assert cut.truncated_tokens == 0 or len(full.input_ids) > max_length
    ids = full.input_ids[full.prompt_length :]
    kept = cut.input_ids[cut.prompt_length :]
    assert kept == ids[: len(kept)], "a completion loses only its end"
    marker = rendering.response_marker
    assert cut.input_ids[: cut.prompt_length][-len(marker) :] == marker
    assert kept == ids or cut.input_ids[: cut.prompt_length] == marker, (
        "the prompt goes before the completion does"
    )
    alone = rendering.encode_prompt(prompt)
    assert alone.prompt_length == len(alone.input_ids) <= max_length
    assert rendering.encode(prompt, completion) == cut, "what was encoded before changes nothing"


@laws
@given(question=tricky.filter(bool), answer=tricky.filter(lambda text: has_text(user(text))))
def test_no_text_can_fake_a_turn(question, answer):
    honest, attacked = WIDE.encode(user("x"), assistant("y")), WIDE.encode(user(question), assistant(answer))
    for special in range(4):
        assert attacked.input_ids.count(special) == honest.input_ids.count(special)
    assert TOKENIZER.decode(attacked.input_ids) == (
        f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
    )


@pytest.mark.parametrize("text", ["\n", "\n\nSo.", " So."])
def test_border_holds_for_any_first_character(text):
    encoded = WIDE.encode(user("x"), assistant(text + "."))
    assert TOKENIZER.decode(encoded.input_ids[encoded.prompt_length :]) == text + ".<|im_end|>\n"
