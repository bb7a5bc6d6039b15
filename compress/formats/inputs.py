"""Which inputs a model gets: what the file says, completed and checked by what the user says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from compress.errors import UsageError
from compress.model import BATCH, TensorSpec

EXAMPLE = "--input 1x3x224x224"


def parse_inputs(inputs: Sequence[str | TensorSpec]) -> tuple[TensorSpec, ...]:
    """Specs from the texts of `--input`; a name must not come twice.

    Raises:
        UsageError: a text has another form, or a name is given twice.
    """
    specs = tuple(TensorSpec.parse(spec) if isinstance(spec, str) else spec for spec in inputs)
    for spec in specs:
        if any(isinstance(size, str) for size in spec.shape[1:]):
            raise UsageError(f"--input {spec}: only the first axis may be {BATCH!r}.")
    names = [spec.name for spec in specs if spec.name]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"--input {twice!r} is given twice; give every input once.")
    return specs


def pair_inputs(
    names: Sequence[str], given: Sequence[TensorSpec], model: str
) -> dict[str, TensorSpec]:
    """What was given for each of the model's inputs: by name, the unnamed ones by order.

    Raises:
        UsageError: a name that the model does not have, or more inputs than it takes.
    """
    takes = f"its inputs are {', '.join(names) or 'none'}."
    unknown = [spec.name for spec in given if spec.name and spec.name not in names]
    if unknown:
        raise UsageError(f"{model} has no input called {unknown[0]!r}; {takes}")
    if len(given) > len(names):
        raise UsageError(f"--input was given {len(given)} times for {model}; {takes}")
    pairs = {spec.name: spec for spec in given if spec.name}
    free = (name for name in names if name not in pairs)
    for spec in given:
        if not spec.name:
            name = next(free)
            pairs[name] = replace(spec, name=name)
    return {name: pairs[name] for name in names if name in pairs}


def complete_inputs(
    known: Sequence[TensorSpec], given: Sequence[TensorSpec], model: str
) -> tuple[TensorSpec, ...]:
    """The file's own inputs, with the axes that it leaves open set to what was given.

    A dynamic axis 0 that nobody pins becomes `BATCH`.

    Raises:
        UsageError: file and user contradict each other, or an axis other than the first
            stays open.
    """
    pairs = pair_inputs([spec.name for spec in known], given, model)
    specs = tuple(_complete(spec, pairs.get(spec.name), model) for spec in known)
    for spec in specs:
        axes = [str(axis) for axis, size in enumerate(spec.shape) if axis and _open(size)]
        if axes:
            shape = "x".join("1" if isinstance(size, str) else str(size) for size in spec.shape)
            raise UsageError(
                f"{model}: axis {' and '.join(axes)} of input {spec} may have any size, and only "
                f"axis 0 (the batch) can stay so. Pin it, for example with --input "
                f"{spec.name}:{shape}, and real sizes in place of each 1."
            )
    return tuple(
        replace(spec, shape=tuple(BATCH if _open(size) else size for size in spec.shape))
        for spec in specs
    )


def _complete(known: TensorSpec, given: TensorSpec | None, model: str) -> TensorSpec:
    if given is None:
        return known
    fits = len(given.shape) == len(known.shape) and all(
        _open(ours) or ours == theirs for ours, theirs in zip(known.shape, given.shape, strict=True)
    )
    # A text without a dtype reads as float32, so that one never contradicts.
    if not fits or given.dtype not in (known.dtype, "float32"):
        raise UsageError(
            f"--input {given} contradicts {model}, whose input is {known}. Leave --input out, or "
            "give a shape that fits the file's."
        )
    return replace(known, shape=given.shape)


def _open(size: int | str) -> bool:
    return isinstance(size, str)


def missing_inputs(model: str, names: Sequence[str]) -> UsageError:
    """The error for a model whose input shapes nobody has said."""
    example = EXAMPLE
    if len(names) > 1:
        example = " ".join(f"--input {name}:1x128" for name in names)
    return UsageError(
        f"{model} does not say what shape its input{'s' * (len(names) > 1)} "
        f"({', '.join(names) or 'none'}) must have. Give {example} (SHAPE, NAME:SHAPE or "
        "NAME:SHAPE:DTYPE), with the sizes that it was trained with."
    )
