"""YAML plus dotted overrides, checked against the component's own config class.

Each component declares its config beside its code as a subclass of `Config`; this module only reads.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails
from yaml import YAMLError

from ldct_dist.errors import UserError


class Config(BaseModel):
    """Base of every component's config: frozen, with finite numbers only, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


def looked_up(path: Path | str) -> Path:
    """The path with ~ and variables expanded in this process. Raises RuntimeError for the home of an unknown user."""
    return Path(os.path.expandvars(path)).expanduser()


def _known(path: Path) -> Path:
    """`looked_up`; raises ValueError for a user or a variable that is unknown in this process, and where the path is not
    UTF-8, in which a run's config is written."""
    try:
        found = looked_up(path)
    except RuntimeError as e:
        raise ValueError(f"{path}: no such user's home") from e
    if unknown := re.search(r"\$(\w+|\{\w+\})", str(found)):
        raise ValueError(f"{path}: {unknown[0]} is not set here")
    if os.fsencode(found).decode(errors="replace") != str(found):
        raise ValueError(f"{path}: not UTF-8, in which configs are written; rename it, or give a link to it")
    return found


def rising(value: tuple[float, float]) -> tuple[float, float]:
    """The range itself. Raises ValueError if its ends are in the wrong order."""
    if value[0] > value[1]:
        raise ValueError(f"a range goes from small to large, not from {value[0]:g} to {value[1]:g}")
    return value


Positive = Annotated[int, Field(gt=0)]
LocalPath = Annotated[Path, AfterValidator(_known)]
"""A path that is expanded where the config is read. Settings that only a node can expand are plain text until then."""

C = TypeVar("C", bound=Config)


def read(schema: type[C], path: Path | None, overrides: Sequence[str] = ()) -> C:
    """The config at `path` (None: defaults only) with `key.sub=value` overrides, as a `schema`.

    Raises UserError naming the file and every key that is unknown, missing or of the wrong type.
    """
    for override in overrides:
        if "=" not in override:
            raise UserError(f"override {override!r}: write it as key=value, for example data.crop=[32,96,96]")
    try:
        plain = _plain(path, overrides)
    except RecursionError as e:
        where = str(path or "overrides") + (" or the overrides" if path and overrides else "")
        raise UserError(f"{where}: nested far deeper than any setting is; correct it") from e
    return validate(schema, plain, str(path or "config"), overrides)


def _plain(path: Path | None, overrides: Sequence[str]) -> Any:
    """The config at `path` with the overrides, of dicts and lists. Raises UserError as `read` does, and RecursionError."""
    tree = _load(path)
    try:
        given = OmegaConf.from_dotlist(list(overrides))
    except (OmegaConfBaseException, YAMLError, ValueError) as e:
        raise UserError(f"override {' '.join(overrides)}: not readable as YAML: {e}") from e
    try:
        merged = OmegaConf.merge(tree, given)
    except TypeError as e:  # how a key within a list is told
        raise UserError(
            f"{path}: {', '.join(overrides)} does not fit it ({_first_line(e)}); give lists whole, such as "
            "data.crop=[32,96,96]"
        ) from e
    try:
        return OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as e:
        advice = (
            "; for a path's environment variable write $NAME" if isinstance(e, InterpolationKeyError) else ""
        )
        raise UserError(f"{path or 'overrides'}: {_first_line(e)}{advice}") from e


def validate(schema: type[C], plain: Any, where: str, overrides: Sequence[str] = ()) -> C:
    """`plain`, of dicts and lists, as a `schema`.

    Raises UserError with all mistakes; each is told as of the override that has set the key, or else as of `where`.
    """
    try:
        return schema.model_validate(plain)
    except ValidationError as e:
        faults: dict[str, list[str]] = {}
        for fault in e.errors():
            key = ".".join(map(str, fault["loc"]))
            origin = _override_of(key, overrides) or where
            faults.setdefault(origin, []).append(f"{key or 'config'}: {_said(schema, key, fault)}")
        raise UserError("; ".join(f"{origin}: {'; '.join(said)}" for origin, said in faults.items())) from e


def settings(schema: type[Config], prefix: str = "") -> Iterator[str]:
    """The dotted names of all settings of a `schema`."""
    for name, field in schema.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Config):
            yield from settings(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def to_yaml(config: Config) -> str:
    """The resolved config as YAML, in the order its fields are declared."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))


def _first_line(e: Exception) -> str:
    """The first line of OmegaConf's message, and the key; the other lines are notes."""
    key, line = getattr(e, "full_key", None), str(e).splitlines()[0]
    return f"{key}: {line}" if key else line


def _override_of(key: str, overrides: Sequence[str]) -> str | None:
    """The last override that has set `key`, a part of it or a section that holds it, as errors name it."""
    for override in reversed(overrides):
        name = override.partition("=")[0]
        if f"{key}.".startswith(f"{name}.") or f"{name}.".startswith(f"{key}."):
            return f"override {override}"
    return None


def _said(schema: type[Config], key: str, fault: ErrorDetails) -> str:
    """What is wrong with the key, in a user's words."""
    if fault["type"] == "extra_forbidden":
        every = list(settings(schema))
        sections = {name.partition(".")[0] for name in every}
        last = {name.rpartition(".")[2]: name for name in every}  # lr is optim.lr
        known = last | {name: name for name in (*every, *sections)}
        close = get_close_matches(key, known)
        return "no such setting" + (f"; did you mean {known[close[0]]}?" if close else "")
    if fault["input"] is None:
        return "a space is missing after the colon" if ":" in str(fault["loc"][-1]) else "it has no value"
    within_list = isinstance(fault["loc"][-1], int)
    if fault["type"] in ("tuple_type", "too_long") or (fault["type"] == "missing" and within_list):
        default = _default(schema, fault["loc"][:-1] if within_list else fault["loc"])
        return "give all its values as a list" + (f", such as {list(default)}" if default else "")
    within = [name for name in settings(schema) if name.startswith(f"{key}.")]
    if fault["type"] == "model_type" and within:
        return f"has settings of its own, such as {within[0]}"
    return (
        "Input should be a path"
        if fault["type"] == "path_type"
        else fault["msg"].removeprefix("Value error, ")
    )


def _default(schema: type[Config], path: Sequence[int | str]) -> Any:
    """The default of the setting at `path`; None if it has none."""
    *sections, name = map(str, path)
    for section in sections:
        schema = getattr(schema.model_fields.get(section), "annotation", Config)
        if not (isinstance(schema, type) and issubclass(schema, Config)):
            return None
    field = schema.model_fields.get(name)
    return field.default if field is not None and not field.is_required() else None


def _load(path: Path | None) -> DictConfig:
    if path is None:
        return OmegaConf.create({})
    try:
        tree = OmegaConf.load(path)
    except FileNotFoundError as e:
        raise UserError(f"{path}: no such config file; see configs/ for examples") from e
    except OmegaConfBaseException as e:
        raise UserError(f"{path}: {_first_line(e)}; is a ${{ without its }}?") from e
    except (OSError, YAMLError, ValueError) as e:  # bytes that are not UTF-8, a number of thousands of digits
        raise UserError(f"{path}: not readable as YAML: {e}") from e
    if not isinstance(tree, DictConfig):
        raise UserError(f"{path}: a config is a mapping of keys to values, this is a list or a single value")
    return tree
