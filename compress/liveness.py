"""Which tensors are in memory while each operator of a schedule runs: intervals and a sweep.

A schedule is the order in which operators run. A tensor is there from the operator that writes it
to the last that reads it; views share the memory of what they look at, and an operator that works
in place takes over the memory of an operand that dies with it.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Step:
    """One operator.

    Attributes:
        name: of the operator, for people.
        op_type: its type.
        reads: tensors that it reads, constants left out.
        writes: tensors that it writes and that take memory of their own.
        overwrites: operands in whose memory its first output may be written, if they die with it
            and are of the same size.
        views: other names for the memory of a tensor, by name.
        scratch: bytes that it needs while it runs.
    """

    name: str
    op_type: str
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    overwrites: tuple[str, ...] = ()
    views: Mapping[str, str] = field(default_factory=dict)
    scratch: int = 0


@dataclass(frozen=True)
class Program:
    """Operators with the sizes of what they pass on to each other.

    Attributes:
        steps: in an order in which they can run.
        sizes: bytes of every tensor that takes memory of its own.
        inputs: tensors that are there before the first step.
        outputs: tensors that are there after the last step.
        held: inputs that the caller holds: there from beginning to end, never written over.
    """

    steps: tuple[Step, ...]
    sizes: Mapping[str, int]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    held: frozenset[str] = frozenset()

    def resolved(self) -> Program:
        """The same with every view replaced by the tensor that it looks at."""
        roots: dict[str, str] = {}
        for step in self.steps:
            roots |= {view: roots.get(source, source) for view, source in step.views.items()}

        def root(names: Iterable[str]) -> tuple[str, ...]:
            return tuple(dict.fromkeys(roots.get(name, name) for name in names))

        steps = tuple(
            dataclasses.replace(
                one,
                reads=tuple(name for name in root(one.reads) if name in self.sizes),
                writes=root(one.writes),
                overwrites=root(one.overwrites),
                views={},
            )
            for one in self.steps
        )
        outputs = tuple(name for name in root(self.outputs) if name in self.sizes)
        return dataclasses.replace(self, steps=steps, outputs=outputs)

    def reordered(self, order: Sequence[int]) -> Program:
        """The same with the steps in another order."""
        return dataclasses.replace(self, steps=tuple(self.steps[index] for index in order))


@dataclass(frozen=True)
class Storage:
    """A piece of memory: the tensors that lie in it one after another, and when.

    Attributes:
        names: of the tensors; more than one where operators worked in place.
        size: bytes.
        first: index of the step before or in which it is written, 0 for inputs.
        last: index of the last step that needs it.
    """

    names: tuple[str, ...]
    size: int
    first: int
    last: int


@dataclass(frozen=True)
class Peak:
    """The most memory that a schedule needs at once.

    Attributes:
        bytes: that many.
        step: name of the operator that needs it.
        op_type: its type.
        alive: tensors that are in memory then, with their bytes, the largest first.
        scratch: bytes that this operator needs besides them; part of `bytes`.
    """

    bytes: int
    step: str = ""
    op_type: str = ""
    alive: tuple[tuple[str, int], ...] = ()
    scratch: int = 0


def storages(program: Program) -> tuple[Storage, ...]:
    """Every piece of memory with its interval, in order of the first use."""
    return _storages(program.resolved())


def _storages(program: Program) -> tuple[Storage, ...]:
    """The same of a program without views."""
    end = len(program.steps) - 1
    last: dict[str, int] = dict.fromkeys(program.inputs, 0)
    for index, step in enumerate(program.steps):
        last |= dict.fromkeys(step.writes, index)
        last |= dict.fromkeys(step.reads, index)
    kept = frozenset(program.outputs) | program.held
    last |= dict.fromkeys(kept, max(end, 0))
    first = dict.fromkeys(program.inputs, 0)
    place: dict[str, tuple[str, ...]] = {name: (name,) for name in program.inputs}
    for index, step in enumerate(program.steps):
        first |= dict.fromkeys(step.writes, index)
        place |= {name: (name,) for name in step.writes}
        if step.overwrites:
            dying = {name for name in step.reads if last[name] == index} - kept
            taken = overwritten(step, program.sizes, dying)
            if taken is not None:
                place[step.writes[0]] = (*place.pop(taken), step.writes[0])
    return tuple(
        Storage(names, program.sizes[names[0]], first[names[0]], last[names[-1]])
        for names in sorted(place.values(), key=lambda names: first[names[0]])
        if program.sizes[names[0]]
    )


def overwritten(step: Step, sizes: Mapping[str, int], dying: Container[str]) -> str | None:
    """The operand in whose memory a resolved step writes its first output, if there is one.

    Args:
        step: of a resolved program.
        sizes: of the program.
        dying: tensors that nothing needs after it.
    """
    if not step.writes:
        return None
    size = sizes[step.writes[0]]
    fits = (n for n in step.overwrites if n in step.reads and sizes[n] == size and n in dying)
    return next(fits, None) if size else None


def sweep(program: Program) -> list[int]:
    """Bytes that are in use while each step runs."""
    return _sweep(program, storages(program))


def _sweep(program: Program, pieces: Sequence[Storage]) -> list[int]:
    changes: dict[int, int] = defaultdict(int)
    for one in pieces:
        changes[one.first] += one.size
        changes[one.last + 1] -= one.size
    alive, found = 0, []
    for index, step in enumerate(program.steps):
        alive += changes[index]
        found.append(alive + step.scratch)
    return found


def peak(program: Program) -> Peak:
    """The most that is in use at once, where, and what lies there; the first place of equals."""
    program = program.resolved()
    pieces = _storages(program)
    in_use = _sweep(program, pieces)
    if not in_use:
        return Peak(0)
    index = max(range(len(in_use)), key=lambda i: (in_use[i], -i))
    step = program.steps[index]
    written = {name: i for i, one in enumerate(program.steps) for name in one.writes}
    alive = [one for one in pieces if one.first <= index <= one.last]
    names = [[n for n in one.names if written.get(n, 0) <= index][-1] for one in alive]
    shown = sorted(zip(names, (one.size for one in alive), strict=True), key=lambda row: -row[1])
    return Peak(in_use[index], step.name, step.op_type, tuple(shown), step.scratch)
