"""The trunk's states on disk: the same as computed ones, and whole again after any kind of interruption."""

import pytest
import torch

from prefmoe.data.render import Encoded
from prefmoe.errors import CheckpointError
from prefmoe.reward.texts import TextTable
from prefmoe.reward.trunk import Trunk
from tiny import tiny_backbone

SPLIT = 2
LENGTHS = [5, 12, 7, 3]


def table_of(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(3)
    table = TextTable()
    for length in lengths:
        ids = torch.randint(3, 300, (length,), generator=generator).tolist()
        table.add(Encoded(tuple(ids), min(2, length), 0))
    return table


def trunk_of(folder=None, *, table=None, **options):
    return Trunk(
        options.pop("backbone", None) or tiny_backbone(), SPLIT, table or table_of(), folder=folder, **options
    )


def real_states(batch):
    """States of the tokens of every text."""
    return [batch.trunk[nodes] for nodes in batch.packing.nodes()]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(real_states(left), real_states(right), strict=True))


@pytest.fixture
def prepared(tmp_path):
    """A cache folder with all texts in it, and its two files."""
    trunk = trunk_of(tmp_path)
    trunk.prepare(range(4))
    return tmp_path, trunk.folder / "index.tsv", trunk.folder / "states.bin"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cached_states_are_computed_ones_bit_for_bit(tmp_path, dtype):
    backbone = tiny_backbone(dtype=dtype)
    cached, fresh = trunk_of(tmp_path, backbone=backbone), trunk_of(backbone=backbone)
    order = [1, 2, 0, 3]  # longest first, as `prepare` runs them
    cached.prepare(range(4))
    assert cached.batch(order).trunk.dtype == dtype
    assert same(cached.batch(order), fresh.batch(order))
    assert same(trunk_of(tmp_path, backbone=backbone).batch(order), fresh.batch(order))


def test_states_are_those_of_the_backbone_after_its_first_layers(prepared):
    folder, *_ = prepared
    backbone, table = tiny_backbone(), table_of()
    for text, states in enumerate(real_states(trunk_of(folder).batch(range(4)))):
        with torch.no_grad():
            hidden = backbone(
                torch.tensor([table.texts[text].input_ids]), output_hidden_states=True
            ).hidden_states
        torch.testing.assert_close(states, hidden[SPLIT][0])


def test_a_batch_says_where_texts_and_completions_begin_and_end(prepared):
    batch = trunk_of(prepared[0]).batch([3, 1])
    assert batch.packing.lengths.tolist() == [3, 12]
    assert batch.starts.tolist() == [2, 2]
    assert batch.trunk.shape == (3 + 12, 32)


def test_cached_texts_are_not_computed_again(prepared, monkeypatch):
    again = trunk_of(prepared[0])
    monkeypatch.setattr(Trunk, "_compute", lambda *_: pytest.fail("computed"))
    again.prepare(range(4))
    again.batch([0, 1, 2, 3])


def test_new_texts_are_added_behind_the_old_ones(prepared):
    folder, _, data = prepared
    before = data.read_bytes()
    table = table_of([*LENGTHS, 9, 4])
    more = trunk_of(folder, table=table)
    more.prepare(range(6))
    assert data.read_bytes()[: len(before)] == before
    assert data.stat().st_size == sum([*LENGTHS, 9, 4]) * 32 * 4
    fresh = trunk_of(table=table).batch([4])
    torch.testing.assert_close(real_states(more.batch(range(6)))[4], real_states(fresh)[0])


def test_texts_with_equal_tokens_are_kept_once_even_if_their_prompts_differ(tmp_path):
    table = table_of()
    table.add(Encoded(table.texts[0].input_ids, 4, 0))
    trunk = trunk_of(tmp_path, table=table)
    trunk.prepare(range(5))
    trunk.prepare(range(5))
    batch = trunk.batch([0, 4])
    assert (trunk.folder / "states.bin").stat().st_size == sum(LENGTHS) * 32 * 4
    assert batch.starts.tolist() == [2, 4]
    assert torch.equal(*real_states(batch))


def test_what_texts_share_is_kept_once(tmp_path):
    table, generator = TextTable(), torch.Generator().manual_seed(3)
    prompt, *ends = (tuple(torch.randint(3, 300, (n,), generator=generator).tolist()) for n in (20, 4, 9, 6))
    texts = [table.add(Encoded(prompt + end, 20, 0)) for end in ends] + [table.add(Encoded(prompt, 20, 0))]
    trunk = trunk_of(tmp_path, table=table)
    trunk.prepare(texts)
    assert (trunk.folder / "states.bin").stat().st_size == (20 + 4 + 9 + 6) * 32 * 4
    again = trunk_of(tmp_path, table=table)
    assert same(again.batch(texts), trunk_of(table=table).batch(texts))
    for text in texts:  # also in a batch that lacks the text that brought the prompt
        torch.testing.assert_close(
            real_states(again.batch([text])), real_states(trunk_of(table=table).batch([text]))
        )


def cut(file, size):
    file.write_bytes(file.read_bytes()[:size])


INTERRUPTIONS = {
    "a cut index line": lambda index, data: cut(index, index.stat().st_size - 3),
    "an index line without its end": lambda index, data: cut(index, index.stat().st_size - 1),
    "no index": lambda index, data: index.unlink(),
    "an empty index": lambda index, data: cut(index, 0),
    "noise in the index": lambda index, data: index.write_bytes(index.read_bytes()[:-5] + b"\0\0\0\n\n"),
    "data without an index line": lambda index, data: data.write_bytes(data.read_bytes() + b"\7" * 333),
    "cut data": lambda index, data: cut(data, data.stat().st_size - 100),
    "half of the data": lambda index, data: cut(data, data.stat().st_size // 2),
    "no data": lambda index, data: data.unlink(),
    "empty data": lambda index, data: cut(data, 0),
}


@pytest.mark.parametrize("interruption", INTERRUPTIONS)
def test_a_killed_writer_costs_only_what_it_had_not_finished(prepared, interruption):
    folder, index, data = prepared
    expected = real_states(trunk_of().batch(range(4)))
    INTERRUPTIONS[interruption](index, data)
    for _ in range(2):  # the run that finds it, and the one after
        trunk = trunk_of(folder)
        torch.testing.assert_close(real_states(trunk.batch([1, 2])), expected[1:3])
        trunk.prepare(range(4))
        torch.testing.assert_close(real_states(trunk.batch(range(4))), expected)
    assert data.stat().st_size == sum(LENGTHS) * 32 * 4
    assert len(index.read_text().splitlines()) == 4


def test_another_process_sees_what_was_written_after_reload(tmp_path):
    reader, writer = trunk_of(tmp_path), trunk_of(tmp_path)
    writer.prepare(range(4))
    reader.reload()
    assert same(reader.batch([0, 1]), writer.batch([0, 1]))
    assert reader.folder == writer.folder


def test_a_cache_that_would_grow_too_large_is_not_written(tmp_path):
    trunk = trunk_of(tmp_path, max_gib=(sum(LENGTHS) * 32 * 4 - 1) / 2**30)
    trunk.prepare(range(4))
    assert list(trunk.folder.iterdir()) == []
    assert same(trunk.batch(range(4)), trunk_of().batch(range(4)))
    exact = trunk_of(tmp_path, max_gib=sum(LENGTHS) * 32 * 4 / 2**30)
    exact.prepare(range(4))
    assert (exact.folder / "states.bin").exists()


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trunk = trunk_of()
    trunk.prepare(range(4))
    trunk.reload()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", [{"seed": 1}, {"dtype": torch.bfloat16}, {"layers": 3}])
def test_another_backbone_has_another_cache(prepared, change):
    folder, *_ = prepared
    other = trunk_of(folder, backbone=tiny_backbone(**change))
    assert list(other.folder.iterdir()) == []
    assert same(other.batch([0, 1]), trunk_of(backbone=tiny_backbone(**change)).batch([0, 1]))


def test_small_batches_give_the_same_states(tmp_path):
    trunk = trunk_of(tmp_path, batch_tokens=1)
    trunk.prepare(range(4))
    torch.testing.assert_close(real_states(trunk.batch(range(4))), real_states(trunk_of().batch(range(4))))


def test_a_full_disk_is_a_sentence_and_the_next_run_goes_on(tmp_path, monkeypatch):
    def full(path, *args, **kwargs):
        raise OSError(28, "No space left on device")

    trunk = trunk_of(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.open", full)
        with pytest.raises(CheckpointError, match="cannot be kept.*No space left.*trunk_cache to false"):
            trunk.prepare(range(4))
    trunk.prepare(range(4))
    assert same(trunk.batch(range(4)), trunk_of().batch(range(4)))
