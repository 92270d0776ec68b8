"""The tasks file: which tasks there are, and what an inner expert of each should judge.

    tasks:
      summarization:
        description: A shorter text that says what the article says.
        capabilities:
          coverage:
            sentence: The summary contains the main points of the article.
            rule: on_topic                       # optional: the rule that labels it offline
          readability: The summary reads well.   # short for a sentence without a rule

An LLM judge is shown the sentences; the rule labeler uses the rules; training uses the names. A judge that is
asked in Chinese is shown `description_zh` and `sentence_zh`.
"""

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from pydantic_core import ErrorDetails

from prefmoe.errors import ConfigError, join_problems
from prefmoe.suggest import nearest

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class _Checked(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Capability(_Checked):
    """One point that an expert judges: a sentence for people and judges, and a rule's name if one fits."""

    sentence: Text
    sentence_zh: Text | None = None
    rule: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: object) -> object:
        return {"sentence": value} if isinstance(value, str) else value


class Task(_Checked):
    """One kind of prompt and the capabilities that matter for it."""

    description: Text
    description_zh: Text | None = None
    capabilities: Annotated[dict[Text, Capability], Field(min_length=1)]


class TaskFile(_Checked):
    """Everything a tasks file says."""

    tasks: Annotated[dict[Text, Task], Field(min_length=1)]

    def rules(self) -> dict[str, dict[str, str]]:
        """Task -> capability -> name of its rule, for the capabilities that have one."""
        return {
            task: {name: point.rule for name, point in content.capabilities.items() if point.rule is not None}
            for task, content in self.tasks.items()
        }


def load_tasks(path: str | Path) -> TaskFile:
    """Reads and checks a tasks file.

    Whether a rule of that name exists is asked by `RuleLabeler`, for rules may be the caller's own.

    Raises:
        ConfigError: The file cannot be read, is no YAML, has a key twice, or has missing, misspelt or wrong
            entries; those are all listed, each with its place.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"{path}: the tasks file cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from error
    except yaml.YAMLError as error:
        raise ConfigError(_yaml_problem(path, error)) from error
    try:
        return TaskFile.model_validate(content)
    except ValidationError as error:
        problems = [f"{path}: {_sentence(detail)}" for detail in error.errors()]
        raise ConfigError(join_problems(problems)) from error


class _Loader(yaml.SafeLoader):
    """A SafeLoader that refuses a key given twice, which YAML readers otherwise drop without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                problem = f"{name!r} is given twice; keep one"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep=deep)


def _yaml_problem(path: str | Path, error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return f"{path}: not YAML: {error}"
    return f"{path}:{error.problem_mark.line + 1}: {error.problem}"


_LEVELS: Mapping[int, type[BaseModel]] = {1: TaskFile, 3: Task, 5: Capability}
"""The model that owns a key, by how deep the key stands: tasks.helpful.capabilities.direct.rule is at 5."""


def _sentence(detail: ErrorDetails) -> str:
    place = ".".join(str(part) for part in detail["loc"] if part != "[key]") or "top level"
    match detail["type"]:
        case "extra_forbidden":
            return f"{place}: unknown key; {_did_you_mean(detail['loc'])}"
        case "missing":
            return f"{place}: missing; add it"
        case "too_short" | "string_too_short":
            return f"{place}: empty; fill it in"
        case "model_type" | "dict_type":
            return f"{place}: got {detail['input']!r}; expected 'name: value' lines below it"
        case _:
            return f"{place}: got {detail['input']!r}; {detail['msg'].lower()}"


def _did_you_mean(loc: tuple[int | str, ...]) -> str:
    known = list(_LEVELS[len(loc)].model_fields)
    near = nearest(str(loc[-1]), known)
    return f"did you mean {near!r}?" if near else f"expected {' or '.join(map(repr, known))}"
