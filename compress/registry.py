"""Targets, passes and devices by name, through entry points: ours are found exactly as others are.

Nothing is imported until it is asked for by name, so a broken plug-in fails only for those
who use it.
"""

from __future__ import annotations

import difflib
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, cast

from compress.errors import CompressError, UnsupportedError, UsageError
from compress.passes import Pass
from compress.target import Target

Group = Literal["compress.targets", "compress.passes", "compress.devices"]


def available(group: Group) -> dict[str, EntryPoint]:
    """Every registered name of a group.

    Raises:
        CompressError: two distributions provide the same name; both are named.
    """
    found: dict[str, EntryPoint] = {}
    for point in sorted(entry_points(group=group), key=lambda point: point.name):
        other = found.setdefault(point.name, point)
        if other.value != point.value:
            raise CompressError(
                f"{point.name!r} is provided twice in {group}: by {other.value} "
                f"({_owner(other)}) and by {point.value} ({_owner(point)}). Uninstall one of them."
            )
    return found


def create_target(name: str, **options: Any) -> Target:
    """The target called `name`, with its dataclass fields set from `options`.

    An option that is None is left out, so that a target without that field can be created.
    """
    options = {key: value for key, value in options.items() if value is not None}
    return cast("Target", _create("compress.targets", "target", name, options))


def require_target(target: Target) -> None:
    """Refuse a target that cannot be used here.

    Raises:
        UnsupportedError: with the reason and the install line.
    """
    check = target.check()
    if not check.available:
        install = f" Install it with: {check.install}." if check.install else ""
        raise UnsupportedError(f"Target {target.name} cannot be used here: {check.reason}{install}")


def create_pass(name: str, **options: Any) -> Pass:
    """The pass called `name`, with its dataclass fields set from `options`."""
    return cast("Pass", _create("compress.passes", "pass", name, options))


def _create(group: Group, noun: str, name: str, options: dict[str, Any]) -> object:
    found = available(group)
    if name not in found:
        close = difflib.get_close_matches(name, found, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UsageError(
            f"There is no {noun} called {name!r}.{hint} Installed: {', '.join(found) or 'none'}."
        )
    factory = found[name].load()
    try:
        return cast("object", factory(**options))
    except TypeError as error:
        import dataclasses

        is_dataclass = dataclasses.is_dataclass(factory)
        known = [f.name for f in dataclasses.fields(factory)] if is_dataclass else []
        unknown = sorted(set(options) - set(known))
        if not unknown:
            raise
        raise UsageError(
            f"The {noun} {name!r} has no option {', '.join(unknown)}; "
            f"it has {', '.join(known) or 'none'}."
        ) from error


def _owner(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "an unknown distribution"
