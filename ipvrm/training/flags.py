"""What stands beside a flag of a training script, in the metadata of its field.

    lam: float | None = field(default=None, metadata=FRACTION | read_by(GAE) | defaults_of(AdvantageConfig))

A range says what values it may have, `read_by` what reads it (given elsewhere it is refused, never ignored),
and a preset what it is when it is left out. `run_folder.FREE` says that a resumed run may change it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from ipvrm.errors import IpvrmError
from ipvrm.losses.presets import by_preset

Metadata = dict[str, Any]
Config = TypeVar("Config", bound=Any)
Value = TypeVar("Value")


def must(words: str, holds: Callable[[float], bool]) -> Metadata:
    """A range: `holds` of a value that is not None, in words behind "must"."""
    return {"must": (words, holds)}


AT_LEAST_ONE = must("be at least 1", lambda x: x >= 1)
POSITIVE = must("be positive and finite", lambda x: x > 0 and math.isfinite(x))
NOT_NEGATIVE = must("not be negative", lambda x: x >= 0 and math.isfinite(x))
FRACTION = must("lie in [0, 1]", lambda x: 0 <= x <= 1)
FINITE = must("be finite", math.isfinite)


@dataclass(frozen=True)
class Reader:
    """What reads a flag: `reads`, of a config whose earlier flags are filled in; `refusal` of the flag where
    it does not, a format of `flag` and of the config's values."""

    reads: Callable[[Any], bool]
    refusal: str


def read_by(*readers: Reader) -> Metadata:
    """A flag that has to do only where all of `readers` read it; the first that does not is named."""
    return {"read_by": readers}


def default(value: Callable[[Any], Any]) -> Metadata:
    """`value` of a config whose earlier flags are filled in, where the flag is None."""
    return {"default": lambda config, name: value(config)}


def defaults(*, paper: Any, release: Any) -> Metadata:
    """The value under each preset, where the flag is None."""
    return {"default": lambda config, name: by_preset(config.preset, paper=paper, release=release)}


def defaults_of(options: Any) -> Metadata:
    """The value of the same name in the preset of a dataclass of options, where the flag is None."""
    return {"default": lambda config, name: getattr(options.preset(config.preset), name)}


def filled(value: Value | None) -> Value:
    """A flag of a resolved config that is None only before."""
    assert value is not None
    return value


def given(config: Any, name: str) -> bool:
    """Whether a flag differs from its default, which cannot be told from one left out."""
    return bool(getattr(config, name) != type(config).__dataclass_fields__[name].default)


def fill(config: Config) -> Config:
    """`config` with its empty flags filled in, in the order of the fields; what nothing reads stays None.

    Raises:
        IpvrmError: a flag is given that nothing reads.
    """
    for field in fields(config):
        missing = next((r for r in field.metadata.get("read_by", ()) if not r.reads(config)), None)
        if missing is not None and given(config, field.name):
            raise IpvrmError(missing.refusal.format(flag=field.name, **vars(config)))
        if missing is None and "default" in field.metadata and getattr(config, field.name) is None:
            config = replace(config, **{field.name: field.metadata["default"](config, field.name)})
    return config


def check_ranges(config: Any) -> None:
    """Raises IpvrmError for the first value out of the range of its flag."""
    for field in fields(config):
        words, holds = field.metadata.get("must", ("", None))
        value = getattr(config, field.name)
        if holds is not None and value is not None and not holds(value):
            raise IpvrmError(f"{field.name} must {words}; got {value}")


def options(options_class: Any, config: Any) -> Any:
    """The preset of a dataclass of options, with those that are flags of `config` and not None."""
    flags = {field.name for field in fields(options_class)} & set(vars(config))
    filled = {name: value for name in flags if (value := getattr(config, name)) is not None}
    return replace(options_class.preset(config.preset), **filled)
