"""Makes the Auto classes of transformers know our model, without importing transformers before the user does.

`AutoConfig.register` needs the config's class, and that needs transformers and torch: seconds, for `prefmoe --help`
too. So this waits for the import of transformers' list of configs; then it imports ours, which registers itself, and
registers the model as soon as a config is made.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_AWAITED = "transformers.models.auto.configuration_auto"
_OURS = "prefmoe.reward.config"


def register_when_transformers_is_imported() -> None:
    """Call once, when prefmoe is imported."""
    if _AWAITED in sys.modules:
        import_module(_OURS)
    else:
        sys.meta_path.insert(0, _Waiting())


class _Waiting(MetaPathFinder):
    """Finds one module, as Python itself does, and imports ours behind it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            import_module(_OURS)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
