"""Peak memory of a piece of work, counted tensor by tensor."""

import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operations inside the `with` block make, for as long as they live.

    Every storage once, views not at all, tensors from before the block not at all. What an operation allocates and
    frees inside itself is not seen. Works the same on every device.

    Attributes:
        now: Bytes alive.
        peak: Largest `now` so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._note([*args, *(kwargs or {}).values()], is_new=False)
        result = func(*args, **(kwargs or {}))
        self._note(result, is_new=True)
        return result

    def _note(self, values: object, *, is_new: bool) -> None:
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._known:
                self._follow(tensor.untyped_storage(), is_new=is_new)

    def _follow(self, storage: UntypedStorage, *, is_new: bool) -> None:
        num_bytes = storage.nbytes() if is_new else 0
        self._known.add(storage._cdata)
        self.now += num_bytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, storage._cdata, num_bytes).atexit = False

    def _forget(self, address: int, num_bytes: int) -> None:
        self._known.discard(address)
        self.now -= num_bytes


def peak_bytes(work: Callable[[], object]) -> int:
    """Most bytes of new tensors that were alive at one time during a call."""
    with LiveBytes() as live:
        work()
    return live.peak


def stored_bytes(modules: Iterable[torch.nn.Module]) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    tensors = {
        t.data_ptr(): t.nbytes for module in modules for t in [*module.parameters(), *module.buffers()]
    }
    return sum(tensors.values())
