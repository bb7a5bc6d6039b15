"""budgets.yaml: limits for any target and machine, or for one of them.

    budget: 1
    limits:
      - latency_p50: {max_slowdown: 2.5%}
        accuracy: {max_drop: 0.5 points}
      - target: onnxruntime
        machine: 163700a654c3
        latency_p50: {max: 80 us}

An entry counts where its `target` and its `machine` fit; where two that count give the same limit,
the later one holds. An absolute latency is the only limit that means nothing elsewhere, so its
entry must name a machine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from compress.errors import UsageError
from compress.regression.limits import KINDS, Limit, known, read_limit

VERSION = 1
_SELECTORS = ("target", "machine", "note")
Key = tuple[str, str]
"""Metric and kind."""


@dataclass(frozen=True)
class Entry:
    """Limits of one target on one machine.

    Attributes:
        limits: by metric and kind; None takes an earlier limit back.
        target: name of a target, "" for any.
        machine: fingerprint, "" for any.
        note: what the machine is, in the user's words.
    """

    limits: Mapping[Key, Limit | None]
    target: str = ""
    machine: str = ""
    note: str = ""


@dataclass(frozen=True)
class Applied:
    """What a budget says about one candidate on one machine.

    Attributes:
        limits: that are judged here.
        elsewhere: limits of other machines that nothing here stands for, with the reason.
        lifted: limits that the budget takes back, defaults among them.
    """

    limits: tuple[Limit, ...]
    elsewhere: tuple[tuple[Limit, str], ...] = ()
    lifted: frozenset[Key] = frozenset()


@dataclass(frozen=True)
class Budget:
    """Entries in order of the file."""

    entries: tuple[Entry, ...]
    source: str = "budget"

    def applied(self, targets: Sequence[str], machine: str) -> Applied:
        """The limits that count for a candidate.

        Args:
            targets: names under which the candidate's target is known.
            machine: fingerprint of this machine.
        """
        here: dict[Key, Limit | None] = {}
        away: dict[Key, tuple[Limit, str]] = {}
        for entry in self.entries:
            if entry.target and entry.target not in targets:
                continue
            if entry.machine in ("", machine):
                here |= entry.limits
                continue
            note = f" ({entry.note})" if entry.note else ""
            reason = f"The limit is for machine {entry.machine}{note}; this one is {machine}."
            away |= {key: (one, reason) for key, one in entry.limits.items() if one}
        return Applied(
            tuple(one for one in here.values() if one),
            tuple(pair for key, pair in away.items() if key not in here),
            frozenset(key for key, one in here.items() if one is None),
        )

    @property
    def targets(self) -> set[str]:
        """The targets that entries name."""
        return {entry.target for entry in self.entries if entry.target}


def load_budget(given: Path | str | Budget | Mapping[str, Any] | Sequence[Any]) -> Budget:
    """A budget from a file; in Python also an entry, or a list of them, as the file would hold it.

    Raises:
        UsageError: the file cannot be read, or something in it is not allowed; the message names
            file and key.
    """
    if isinstance(given, Budget):
        return given
    if not isinstance(given, (str, Path)):
        entries = [given] if isinstance(given, Mapping) else list(given)
        return Budget(tuple(_entry(one, f"limits[{n}]") for n, one in enumerate(entries)), "limits")
    path = Path(given)
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"Budget {path} cannot be read: {reason}. `compress baseline MODEL --budget {path}` "
            f"writes one with what was measured."
        ) from error
    except (yaml.YAMLError, RecursionError) as error:
        what = re.sub(r"\s+", " ", str(error))
        raise UsageError(f"Budget {path} is not plain YAML: {what}") from error
    return _document(document, path)


def _document(document: object, path: Path) -> Budget:
    where = f"Budget {path}"
    if not isinstance(document, dict):
        raise UsageError(
            f"{where} holds {type(document).__name__} and not a mapping with `budget: {VERSION}` "
            f"and a list `limits`."
        )
    for key in document:
        known(key, ("budget", "limits"), where, "key")
    version, entries = document.get("budget"), document.get("limits")
    if version != VERSION or isinstance(version, bool):
        raise UsageError(
            f"{where}: budget is {version!r}, the version of the file's form, and this release "
            f"reads {VERSION}. Begin the file with `budget: {VERSION}`."
        )
    if not isinstance(entries, list) or not entries:
        raise UsageError(
            f"{where}: limits is {entries!r}, and it must be a list with at least one entry, each "
            f"a mapping such as `- latency_p50: {{max_slowdown: 3%}}`."
        )
    found = (_entry(one, f"{where}: limits[{number}]") for number, one in enumerate(entries))
    return Budget(tuple(found), str(path))


def _entry(given: object, where: str) -> Entry:
    if not isinstance(given, Mapping):
        raise UsageError(
            f"{where} is {given!r}, and it must be a mapping of metrics to limits, such as "
            f"`latency_p50: {{max_slowdown: 3%}}`."
        )
    limits: dict[Key, Limit | None] = {}
    selectors: dict[str, str] = {}
    for name, value in given.items():
        key = known(name, (*_SELECTORS, *KINDS), where, "key")
        if key in _SELECTORS:
            selectors[key] = _selector(key, value, where)
        else:
            limits |= _limits(key, value, where)
    entry = Entry(limits, **selectors)
    absolute = [one for one in limits.values() if one and one.latency and one.absolute]
    if absolute and not entry.machine:
        raise UsageError(
            f"{where}: {absolute[0].metric}.max is an absolute latency, which means nothing on "
            f"another machine. Add `machine: FINGERPRINT` to the entry (`compress doctor --json` "
            f"says it), or limit max_slowdown instead."
        )
    return entry


def _selector(key: str, value: object, where: str) -> str:
    if isinstance(value, str) and value.strip():
        return value
    hint = ""
    if key == "machine":
        hint = " A fingerprint of digits alone needs quotes, as YAML takes it for a number."
    raise UsageError(f"{where}: {key} is {value!r}, and it must be a text.{hint}")


def _limits(metric: str, value: object, where: str) -> dict[Key, Limit | None]:
    if not isinstance(value, Mapping) or not value:
        one = KINDS[known(metric, KINDS, where, "metric")]
        raise UsageError(
            f"{where}: {metric} is {value!r}, and it must be a mapping with {' or '.join(one)}."
        )
    found: dict[Key, Limit | None] = {}
    for kind, given in value.items():
        if given is None:
            allowed = KINDS[known(metric, KINDS, where, "metric")]
            found[metric, known(kind, allowed, f"{where}: {metric}", "limit")] = None
        else:
            limit = read_limit(metric, str(kind), given, where)
            found[limit.metric, limit.kind] = limit
    return found
