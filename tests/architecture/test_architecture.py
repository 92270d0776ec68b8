"""What holds for the code base as a whole: directions of imports, sizes, and what importing does."""

import ast
import importlib
import os
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

import prefmoe

SOURCE = Path(prefmoe.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
MODULES = sorted(
    m.name for m in pkgutil.walk_packages([str(SOURCE)], "prefmoe.") if not m.name.endswith("__main__")
)
PACKAGES = sorted(p.name for p in SOURCE.iterdir() if (p / "__init__.py").exists())

MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 60  # docstring included
UNSAFE_CALLS = {"pickle.load", "pickle.loads", "torch.load", "eval", "exec"}


def test_imports_go_one_way(monkeypatch):
    monkeypatch.chdir(SOURCE.parents[1])
    assert lint_imports(no_cache=True) == EXIT_STATUS_SUCCESS


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_files_and_functions_stay_small_and_safe(file):
    text = file.read_text(encoding="utf-8")
    tree = ast.parse(text)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = [f.name for f in functions if f.end_lineno - f.lineno + 1 > MAX_FUNCTION_LINES]
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert text.count("\n") <= MAX_FILE_LINES
    assert long == []
    assert calls & UNSAFE_CALLS == set()


@pytest.mark.parametrize("name", ["prefmoe", *(f"prefmoe.{package}" for package in PACKAGES)])
def test_all_lists_what_a_package_exports(name):
    module = importlib.import_module(name)
    exported = getattr(module, "__all__", [])
    assert sorted(exported) == sorted(set(exported))
    for public in exported:
        assert getattr(module, public) is not None
    assert _public_names(module) - set(exported) == set()


def _public_names(module: ModuleType) -> set[str]:
    """Names that a reader would take for exports: bound in the package, no underscore, no submodule."""
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not isinstance(value, ModuleType)
        and getattr(value, "__module__", "prefmoe").startswith("prefmoe")
    }


def test_the_command_line_starts_without_torch():
    loaded = _in_new_process("import sys, prefmoe.cli.app; print(*sys.modules)").split()
    assert {"torch", "transformers", "datasets", "matplotlib", "numpy"} & set(loaded) == set()


def test_importing_writes_nothing_and_prints_nothing(tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path_factory.mktemp("matplotlib")))  # its fonts are not ours
    program = f"import importlib\nfor name in {MODULES!r}: importlib.import_module(name)"
    assert _in_new_process(program, home=tmp_path) == ""
    assert sorted(tmp_path.rglob("*")) == []


def _in_new_process(program: str, home: Path | None = None) -> str:
    """stdout and stderr of a program that starts in `home` and takes it for the user's home."""
    environment = dict(os.environ, PYTHONDONTWRITEBYTECODE="1")
    if home is not None:
        cleared = {"XDG_CACHE_HOME", "XDG_CONFIG_HOME", "HF_HOME", "HF_HUB_CACHE", "TMPDIR"}
        environment = {k: v for k, v in environment.items() if k not in cleared} | {"HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=environment,
        cwd=home,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr
