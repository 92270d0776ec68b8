"""What the docs say is true: examples run, tables are fresh, names exist."""

import ast
import doctest
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

import prefmoe
from data_helpers import CHATML, byte_tokenizer, write_rows
from prefmoe.data.check import check_files
from prefmoe.labeling import load_tasks
from prefmoe.policy.settings import load_policy_settings
from prefmoe.reward.settings import RewardSettings, load_settings
from tiny import tiny_language_model, tiny_reward_model

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")])
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def _docstrings_with_examples() -> Iterator[tuple[str, str, str]]:
    """(module, where, docstring). Read from the source: the type hook hides functions from doctest's own search."""
    for file in sorted(SOURCE.rglob("*.py")):
        module = ".".join(file.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                if ">>>" in text:
                    yield module, getattr(node, "name", ""), text


@pytest.mark.parametrize(
    ("module", "name", "text"),
    [pytest.param(*found, id=".".join(found[:2])) for found in _docstrings_with_examples()],
)
def test_examples_in_docstrings(module, name, text):
    names = dict(vars(importlib.import_module(module)))
    example = doctest.DocTestParser().get_doctest(text, names, f"{module}.{name}", None, None)
    report: list[str] = []
    failed, _ = doctest.DocTestRunner(verbose=False).run(example, out=report.append)
    assert failed == 0, "".join(report)


@pytest.fixture(scope="module")
def demo_model(tmp_path_factory):
    """A folder with a model where `make demo` leaves one."""
    folder = tmp_path_factory.mktemp("clone")
    tokenizer = byte_tokenizer(CHATML)
    marker = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    model = tiny_reward_model(response_marker=marker, chat_template=CHATML, max_tokens=512)
    model.save_pretrained(folder / "runs/demo/dmoerm", include_backbone=True)
    tokenizer.save_pretrained(folder / "runs/demo/dmoerm")
    rows = [{"prompt": f"{i // 2}?", "chosen": "Yes.", "rejected": f"No {i}."} for i in range(40)]
    write_rows(folder / "train.jsonl", rows)
    return folder


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "```python" in page.read_text()], ids=lambda p: p.name
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # TRL's, about transformers
def test_code_in_the_docs_runs(page, demo_model, monkeypatch, capsys):
    monkeypatch.chdir(demo_model)
    # From a folder, so that what is saved with an adapter says where its model is.
    tiny_language_model().save_pretrained("model")
    model = AutoModelForCausalLM.from_pretrained("model")
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    names: dict[str, object] = {"model": model, "tokenizer": byte_tokenizer(CHATML)}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)
    assert capsys.readouterr().out.strip(), "the example shows nothing"


def test_the_halves_of_a_file_share_no_prompt_and_no_row_is_lost(demo_model, monkeypatch):
    monkeypatch.chdir(demo_model)
    page = (ROOT / "docs" / "policy.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n([^`]*prompt_hash[^`]*)```", page)
    exec(compile(block, "docs/policy.md", "exec"), {})
    halves = ["runs/for_policies.jsonl", "runs/for_judge.jsonl"]
    report = check_files({name: name for name in halves})
    assert report.problems == []
    assert min(report.num_pairs.values()) >= 10
    whole = Path("train.jsonl").read_text(encoding="utf-8").splitlines()
    assert sorted(line for name in halves for line in Path(name).read_text().splitlines()) == sorted(whole)


def test_every_shipped_config_loads():
    assert CONFIGS
    for config in CONFIGS:
        content = yaml.safe_load(config.read_text(encoding="utf-8"))
        kinds = {"tasks": load_tasks, "policy": load_policy_settings, "real": load_settings}
        loaded = kinds["tasks" if "tasks" in content else config.name.partition("-")[0]](config)
        assert loaded.model_dump()


def test_the_config_for_a_gpu_takes_every_pair_and_the_whole_backbone():
    cpu, gpu = (load_settings(ROOT / "configs" / f"real-{kind}.yaml") for kind in ("cpu", "gpu"))
    assert gpu.data.max_pairs_per_task is None
    assert gpu.data.max_validation_pairs_per_task is None
    assert gpu.backbone.num_layers is None
    assert (gpu.data.train, gpu.data.test, gpu.methods) == (cpu.data.train, cpu.data.test, cpu.methods)


def test_the_policy_config_for_a_gpu_is_that_for_a_cpu_with_every_pair():
    cpu, gpu = (load_policy_settings(ROOT / "configs" / f"policy-{kind}.yaml") for kind in ("cpu", "gpu"))
    assert gpu.data.max_pairs_per_preference is None
    assert gpu.data.max_test_pairs_per_preference is None
    assert set(gpu.methods) >= set(cpu.methods)
    for name in ("train", "validation", "test", "preferences"):
        assert getattr(gpu.data, name) == getattr(cpu.data, name)
    for name in ("learning_rate", "lora_learning_rate", "beta"):
        assert getattr(gpu.training, name) == getattr(cpu.training, name)


def test_every_benchmark_has_a_line_with_its_command():
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    for file in (ROOT / "benchmarks").glob("*.py"):
        assert re.search(rf"\| `benchmarks/{file.name}` \| .* \| `python benchmarks/{file.name}[ `]", page), (
            file.name
        )


@pytest.mark.parametrize("file", [*PAGES, *CONFIGS, ROOT / "Makefile"], ids=lambda file: file.name)
def test_configs_and_programs_named_anywhere_exist(file):
    named = re.findall(r"\b(?:configs|benchmarks)/[\w./-]+\.(?:yaml|py)", file.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_generated_parts_are_fresh():
    pages = [str(page) for page in PAGES if "[[[cog" in page.read_text(encoding="utf-8")]
    assert pages
    _run([sys.executable, "-m", "cogapp", "--check", "--diff", "-I", "docs", *pages], cwd=ROOT)


def test_every_setting_says_what_it_means():
    silent = [
        f"{section}.{name}"
        for section, field in RewardSettings.model_fields.items()
        if hasattr(field.annotation, "model_fields")
        for name, setting in field.annotation.model_fields.items()
        if not setting.description
    ]
    own = RewardSettings.model_fields
    silent += [
        name for name, f in own.items() if not hasattr(f.annotation, "model_fields") and not f.description
    ]
    assert silent == []


@pytest.mark.parametrize("name", prefmoe.__all__)
def test_every_public_name_is_in_the_docs(name):
    assert any(name in page.read_text(encoding="utf-8") for page in PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_inside_the_repository_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def _papers_rows() -> Iterator[list[str]]:
    """Cells of every row of the tables of PAPERS.md that name code."""
    for line in (ROOT / "PAPERS.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        if line.startswith("|") and not set(line) <= set("|-: ") and "`" in line:
            yield cells


@pytest.mark.parametrize("cells", [pytest.param(cells, id=cells[0][:40]) for cells in _papers_rows()])
def test_rows_of_papers_md_point_to_code_and_tests_that_exist(cells):
    named = re.findall(r"`([\w./]+)`", " ".join(cells))
    functions = [name for name in named if name.startswith("prefmoe.")]
    tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", " ".join(cells))
    for name in functions:
        assert _resolve(name) is not None
    for file, test in tests:
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file} has no {test}"
    assert tests, "no test is named"


@pytest.mark.parametrize(
    "page", sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("docs/*.md")), ids=lambda page: page.name
)
def test_every_table_has_a_head(page):
    """A blank line inside a table makes plain text of what follows."""
    lines = ["", *page.read_text(encoding="utf-8").splitlines(), ""]
    tops = [i for i, line in enumerate(lines) if line.startswith("|") and not lines[i - 1].startswith("|")]
    assert [lines[i] for i in tops if not re.fullmatch(r"\|[-:| ]+\|", lines[i + 1])] == []


def test_papers_md_has_every_defect_of_the_release():
    rows = [cells[0] for cells in _papers_rows()]
    assert [n for n in range(1, 19) if not any(row.startswith(f"{n}.") for row in rows)] == []


def _resolve(name: str) -> object:
    """The object of a dotted name; a class attribute too."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    raise AssertionError(f"{name} does not exist")


def _run(command: list[str], cwd: Path | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=dict(os.environ), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
