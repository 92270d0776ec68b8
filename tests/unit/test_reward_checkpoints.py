from pathlib import Path

import pytest
import torch

from prefmoe.errors import CheckpointError
from prefmoe.reward.checkpoints import ExpertCheckpoint, load_states, newest_complete, save_states


def state(value: float) -> dict[str, torch.Tensor]:
    return {"layers/0/q.A": torch.full((2, 3), value), "head.bias": torch.tensor(value)}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_states_and_info_survive(tmp_path: Path) -> None:
    file = tmp_path / "new" / "x.safetensors"
    states = {"task/cap@half0": state(1.0), "a": state(-0.5)}
    save_states(file, states, {"a": 0.25, "n": None})
    found, info = load_states(file)
    assert info == {"a": 0.25, "n": None}
    assert found.keys() == states.keys()
    assert all(same(found[name], states[name]) for name in states)
    assert [entry.name for entry in file.parent.iterdir()] == ["x.safetensors"]


def test_tensors_that_are_no_copies_are_saved_as_they_are(tmp_path: Path) -> None:
    whole = torch.arange(6.0).view(2, 3)
    save_states(tmp_path / "x", {"s": {"view": whole.T, "row": whole[1]}}, {})
    found, _ = load_states(tmp_path / "x")
    assert same(found["s"], {"view": whole.T, "row": whole[1]})


@pytest.mark.parametrize("content", [None, b"", b"not a safetensors file"])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "phase1.safetensors"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"phase1\.safetensors: cannot be read .*delete it to compute"):
        load_states(file)


def test_a_file_cut_in_half_is_named(tmp_path: Path) -> None:
    file = tmp_path / "phase1.safetensors"
    save_states(file, {"a": state(1.0)}, {})
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="delete it to compute"):
        load_states(file)


def test_current_and_best_states_survive(tmp_path: Path) -> None:
    best = [ExpertCheckpoint(state(9.0), 0.75, 0.5), None]
    ExpertCheckpoint.save_all(tmp_path, current=[state(1.0), state(2.0)], best=best, without_gain=3)
    current, found, without_gain = ExpertCheckpoint.load_all(tmp_path)
    assert [c["head.bias"].item() for c in current] == [1.0, 2.0]
    assert found[1] is None
    assert found[0] is not None
    assert (found[0].accuracy, found[0].loss, found[0].state["head.bias"].item()) == (0.75, 0.5, 9.0)
    assert without_gain == 3


def test_the_newest_whole_checkpoint_is_found_by_its_number(tmp_path: Path) -> None:
    assert newest_complete(tmp_path / "nothing") is None
    for step in (9, 10, 100, 200):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert newest_complete(tmp_path) is None
    for step, text in ((9, "{}"), (10, "{}"), (100, '{"cut": ')):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-10"
