"""Field bounds, and JSON: a config is written with its format version, and earlier versions are read too."""

import ast
import dataclasses
import difflib
import inspect
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

from rpt_jax.errors import ConfigError

# Version of config.json. Version 1 files do not state it.
FORMAT = 2


@dataclasses.dataclass(frozen=True)
class Move:
    """A field that moved in a version of the format."""

    since: int
    old: str
    new: str
    convert: Callable[[Any], Any] = lambda value: value


MOVES = (
    Move(2, "loss.max_skipped_updates", "run.max_skipped_updates"),
    Move(2, "loss.microbatch_trunks", "mesh.microbatch_trunks"),
    Move(2, "loss.dynamic_sampling_from_step", "rollout.dynamic_sampling_from_step"),
    Move(2, "loss.dynamic_sampling_rounds", "rollout.dynamic_sampling_rounds"),
    Move(2, "positions.difficulty_thresholds", "eval.difficulty_thresholds"),
    Move(2, "reward.name", "reward.terms", lambda name: [name]),
)

_NOTHING = object()


def setting(
    default: Any,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    inside: tuple[float, float] | None = None,
    or_none: bool = False,
    because: str = "",
    free: Literal["", "always", "to readers"] = "",
    shown: bool = False,
    resolved: bool = False,
    before: Any = _NOTHING,
    shows_in_repr: bool = True,
) -> Any:
    """Declare a field with its default and bounds.

    Args:
        at_least: inclusive lower bound.
        above: exclusive lower bound.
        at_most: inclusive upper bound.
        inside: exclusive lower and upper bounds.
        or_none: with `inside`, 0 is allowed too and turns the setting off.
        because: reason for the bound, if it is not obvious.
        free: whether an existing run may use another value: always, or only when it is read.
        shown: `--help` lists it.
        resolved: an empty value or 0 is resolved at the run's first start and kept with the run.
        before: value of runs made before the field existed, if it is not the default.
        shows_in_repr: False keeps names that are made of a section's repr as they were before the field existed.
    """
    rules = {"at_least": at_least, "above": above, "at_most": at_most, "inside": inside, "or_none": or_none}
    metadata = rules | {"because": because, "free": free, "shown": shown, "resolved": resolved}
    return dataclasses.field(
        default=default,
        repr=shows_in_repr,
        metadata=metadata if before is _NOTHING else metadata | {"before": before},
    )


def walk(section: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """Yield (path, field, value) of every leaf field, in the order of the sections."""
    for f in dataclasses.fields(section):
        path, value = f"{prefix}{f.name}", getattr(section, f.name)
        if dataclasses.is_dataclass(f.type) and isinstance(value, f.type):
            yield from walk(value, f"{path}.")
        else:
            yield path, f, value


# --- Checks -------------------------------------------------------------------------------------------------------


def flag_of(path: str) -> str:
    """Return the flag of a setting: "--run.num-steps" for "run.num_steps"."""
    return "--" + path.replace("_", "-")


def check_fields(config: Any) -> None:
    """Check the types of all fields, then their bounds.

    Raises:
        ConfigError: for the first invalid field.
    """
    for path, f, value in walk(config):
        _check_type(path, f, value)
    for path, f, value in walk(config):
        _check_bounds(path, f.metadata, value)


def _check_type(path: str, f: dataclasses.Field, value: Any) -> None:
    if dataclasses.is_dataclass(f.type):
        raise ConfigError(f"{path}={value!r:.80}; it must be a {f.type.__name__}. Correct {flag_of(path)}.")
    if not _fits(value, f.type):
        wanted = getattr(f.type, "__name__", None) if not get_args(f.type) else str(f.type).replace("typing.", "")
        raise ConfigError(f"{path}={value!r:.80}; it must be {wanted}; floats must be finite. Correct {flag_of(path)}.")


def _check_bounds(path: str, rules: Any, value: Any) -> None:
    if (least := rules.get("at_least")) is not None and value < least:
        raise ConfigError(f"{path}={value}; it must be at least {least}. Raise {flag_of(path)}.")
    above, most = rules.get("above"), rules.get("at_most")
    if above is not None and most is not None and not above < value <= most:
        raise ConfigError(f"{path}={value}; it must be in ({above}, {most}]. {flag_of(path)} {most} sets no limit.")
    if above is not None and value <= above:
        raise ConfigError(f"{path}={value}; it must be above {above}, {rules['because']}. Raise {flag_of(path)}.")
    if inside := rules.get("inside"):
        is_off = rules["or_none"] and value == 0
        if not (is_off or inside[0] < value < inside[1]):
            raise ConfigError(
                f"{path}={value}; it must be between {inside[0]} and {inside[1]}. Correct {flag_of(path)}."
            )


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind) and type(value) is str
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        kinds = kinds[:1] * len(value) if isinstance(value, tuple) and kinds[-1] is Ellipsis else kinds
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_fits, value, kinds))
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


# --- JSON ---------------------------------------------------------------------------------------------------------


def to_json(config: Any) -> str:
    """Return all fields and the format version as JSON."""
    return json.dumps({"format": FORMAT} | dataclasses.asdict(config), indent=2, sort_keys=True)


def from_json(cls: type, text: str) -> tuple[Any, dict[str, str]]:
    """Read what `to_json` of this version or an earlier one wrote.

    Moved fields are read from their old place. A missing field takes its default, or its `before` value.

    Returns:
        (config, {path of a missing field, or the old path of a moved one: a sentence about it}).
    Raises:
        ConfigError: not a JSON object; a later format; unknown or ill-typed fields.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"not a JSON config ({error}); it must be written by Config.to_json.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"config is {type(values).__name__}; it must be an object of fields.")
    version = values.pop("format", 1)
    if type(version) is not int or not 1 <= version <= FORMAT:
        raise ConfigError(f"config has format {version!r:.40}; this version reads 1 to {FORMAT}. Update rpt_jax.")
    notes: dict[str, str] = {}
    for move in MOVES:
        if version < move.since:
            _apply(move, values, notes)
    config = _build(cls, values, "", notes)
    for path, f, value in walk(config):
        _check_type(path, f, value)
    return config, notes


def _apply(move: Move, values: dict, notes: dict[str, str]) -> None:
    (old_section, old), (new_section, new) = move.old.split("."), move.new.split(".")
    if isinstance(values.get(old_section), dict) and old in values[old_section]:
        value = move.convert(values[old_section].pop(old))
        if isinstance(values.setdefault(new_section, {}), dict):
            values[new_section][new] = value
            notes[move.old] = f"{move.old} is {move.new}={value}"


def _build(cls: type, values: Any, where: str, notes: dict[str, str]) -> Any:
    if not isinstance(values, dict):
        raise ConfigError(f"config.{where.rstrip('.')} is {type(values).__name__}; it must be an object of fields.")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - set(fields)):
        raise ConfigError(
            f"config{'.' * bool(where)}{where.rstrip('.')} has unknown fields {unknown}; only fields of "
            f"{cls.__name__} are allowed. Use the version of rpt_jax that wrote it, or correct it."
        )
    built = {}
    for name, f in fields.items():
        if name not in values:
            if "before" in f.metadata:
                built[name] = f.metadata["before"]
            filled = built.get(name, f.default if f.default is not dataclasses.MISSING else "its defaults")
            notes[f"{where}{name}"] = f"{where}{name} is missing: {filled}"
        elif dataclasses.is_dataclass(f.type):
            built[name] = _build(f.type, values[name], f"{where}{name}.", notes)
        else:
            built[name] = tuple(values[name]) if isinstance(values[name], list) else values[name]
    return cls(**built)


def take_fields(config: Any, other: Any, paths: Iterable[str]) -> Any:
    """Return `config` with the values that `other` has at those of the paths that exist."""
    for path in paths:
        name, _, rest = path.partition(".")
        if hasattr(config, name):
            value = getattr(other, name)
            value = take_fields(getattr(config, name), value, [rest]) if rest else value
            config = dataclasses.replace(config, **{name: value})
    return config


def with_values(config: Any, values: Mapping[str, Any]) -> Any:
    """Return `config` with values by the setting's path, such as "rollout.group_size".

    Raises:
        ConfigError: there is no such setting.
    """
    known = {path for path, _, _ in walk(config)}
    for path, value in values.items():
        if path not in known:
            close = difflib.get_close_matches(path, known, n=1)
            raise ConfigError(f"there is no setting {path!r}.{f' Did you mean {close[0]!r}?' if close else ''}")
        *sections, name = path.split(".")
        config = _replaced(config, sections, name, value)
    return config


def _replaced(config: Any, sections: list[str], name: str, value: Any) -> Any:
    if not sections:
        return dataclasses.replace(config, **{name: value})
    inner = _replaced(getattr(config, sections[0]), sections[1:], name, value)
    return dataclasses.replace(config, **{sections[0]: inner})


# --- Help ---------------------------------------------------------------------------------------------------------


def help_texts(config: Any) -> dict[str, str]:
    """Return the help text under each field as one line, keyed by the field's path."""
    texts = {}
    for path, owner, name in _owners(type(config), ""):
        texts[path] = _texts_of(owner).get(name, "")
    return texts


def _owners(cls: type, prefix: str) -> Iterator[tuple[str, type, str]]:
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(f.type):
            yield from _owners(f.type, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", cls, f.name


def _texts_of(cls: type) -> dict[str, str]:
    tree = ast.parse(inspect.getsource(sys.modules[cls.__module__]))
    (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls.__name__)
    return {
        node.target.id: " ".join(text.value.value.split())
        for node, text in itertools.pairwise(body)
        if isinstance(node, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }
