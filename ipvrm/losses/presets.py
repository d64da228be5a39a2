"""The two columns of settings: `paper`, the default, and `release`, what the method's released code does."""

from typing import Literal, TypeVar

from ipvrm.errors import IpvrmError

Preset = Literal["paper", "release"]
Settings = TypeVar("Settings")


def by_preset(name: str, *, paper: Settings, release: Settings) -> Settings:
    """The settings of that name. Raises IpvrmError for another."""
    if name not in ("paper", "release"):
        raise IpvrmError(f"preset must be 'paper' or 'release'; got {name!r}")
    return paper if name == "paper" else release
