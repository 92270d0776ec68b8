"""Lets other libraries know our classes as soon as they are imported, without importing them before the user does.

`AutoConfig.register` needs our config's class, and that needs transformers and torch; PEFT's list of methods needs our
tuner: seconds, for `prefmoe --help` too. So prefmoe waits for the import of the library's own list, and imports ours,
which registers itself, right behind it.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


def import_after(awaited: str, ours: str) -> None:
    """Imports our module `ours` as soon as `awaited` has been imported; at once, if it has."""
    if awaited in sys.modules:
        import_module(ours)
    else:
        sys.meta_path.insert(0, _Waiting(awaited, ours))


class _Waiting(MetaPathFinder):
    """Finds one module, as Python itself does, and imports ours behind it."""

    def __init__(self, awaited: str, ours: str) -> None:
        self.awaited, self.ours = awaited, ours

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Python's own answer, with one more thing to do behind the import."""
        if fullname != self.awaited:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            sys.meta_path.remove(self)  # not before: `importlib.util.find_spec` asks too, and imports nothing
            import_module(self.ours)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
