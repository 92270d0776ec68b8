"""From a YAML file and `--set` changes to checked settings, with every problem named at once."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from prefmoe.errors import ConfigError, join_problems
from prefmoe.suggest import nearest


class Section(BaseModel):
    """A part of a config: unknown keys are errors, nothing changes after it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Settings = TypeVar("Settings", bound=Section)


def read_settings(
    kind: type[Settings], path: str | Path, changes: Sequence[str] = (), *, out: str | Path | None = None
) -> Settings:
    """Reads a config file and applies `a.b=value` changes.

    Args:
        kind: What the file describes.
        path: YAML file.
        changes: Such as "phase1.epochs=2"; they win over the file.
        out: Run folder; wins over both.

    Raises:
        ConfigError: the file cannot be read, or has unknown or wrong entries; all are named, with the nearest
            known key.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as problem:
        raise ConfigError(f"{path}: the config cannot be read: {problem.strerror}") from problem
    except (yaml.YAMLError, UnicodeDecodeError) as problem:
        raise ConfigError(f"{path}: not YAML: {str(problem).splitlines()[0]}") from problem
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected keys such as 'data', got {type(content).__name__}")
    for change in changes:
        _apply(content, change)
    if out is not None:
        content["out"] = str(out)
    return validated(kind, content, where=str(path))


def validated(kind: type[Settings], content: Mapping[str, Any], *, where: str) -> Settings:
    """Settings from plain values; raises ConfigError that lists every problem."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise ConfigError(
            join_problems([f"{where}: {_sentence(kind, e)}" for e in error.errors()])
        ) from error


def _apply(content: dict[str, Any], change: str) -> None:
    key, separator, value = change.partition("=")
    if not separator:
        raise ConfigError(f"--set {change!r}: expected key=value, such as phase1.epochs=2")
    *parents, last = key.strip().split(".")
    for parent in parents:
        content = content.setdefault(parent, {})
        if not isinstance(content, dict):
            raise ConfigError(f"--set {change!r}: {parent!r} is a value, not a section")
    try:
        content[last] = yaml.safe_load(value)
    except yaml.YAMLError as problem:
        raise ConfigError(f"--set {change!r}: {value!r} is not a YAML value; quote it") from problem


def _sentence(kind: type[BaseModel], error: Any) -> str:
    # A name like <judge> is pydantic's place for one kind of several; people do not see it.
    loc = [part for part in error["loc"] if not str(part).startswith("<")]
    place = ".".join(map(str, loc))
    if error["type"] == "value_error":  # a sentence of ours
        return ": ".join([*[place][: len(place)], str(error["ctx"]["error"])])
    if error["type"] == "missing":
        return f"{place}: missing; add it"
    if error["type"] != "extra_forbidden":
        return f"{place}: {error['msg']}; got {error['input']!r}"
    known = list(_section_at(kind, loc[:-1]).model_fields)
    guess = nearest(str(loc[-1]), known)
    return f"{place}: unknown key; " + (f"did you mean {guess!r}?" if guess else f"known: {', '.join(known)}")


def _section_at(kind: type[BaseModel], place: Sequence[int | str]) -> type[BaseModel]:
    """The model of the section that stands there."""
    for part in place:
        found = _model_in(kind.model_fields[str(part)].annotation)
        assert found is not None, "only sections have unknown keys"
        kind = found
    return kind


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that an annotation allows, among whatever else."""
    if isinstance(annotation, type):
        return annotation if issubclass(annotation, BaseModel) else None
    found = (_model_in(part) for part in get_args(annotation))
    return next((model for model in found if model is not None), None)
