"""What `--bits` says: formats of weights and activations, for all operators or for each one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from compress.assignment import assign_within
from compress.errors import UsageError
from quant.spec import FORMATS, QuantSpec

Width: TypeAlias = int | str
"""A number of bits of an integer format, or the name of a float format."""

FLOATS = {
    "fp4": "float4_e2m1",
    "fp8": "float8_e4m3fn",
    "fp8_e4m3": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
    "fp16": "float16",
    "bf16": "bfloat16",
}
"""Names of float formats as users write them."""
INTEGERS = tuple(form.bits for name, form in FORMATS.items() if name.startswith("int"))
AUTO = "auto"
AUTO_WIDTHS: tuple[Width, ...] = (4, 6, 8)
"""What "auto" chooses from where every format can be simulated."""


@dataclass(frozen=True)
class SiteFormat:
    """Formats of one operator.

    Attributes:
        weight: of its weight.
        activation: of what it reads and writes.
    """

    weight: QuantSpec
    activation: QuantSpec

    @property
    def bits(self) -> int:
        """Of one weight."""
        return self.weight.bits


def parse_bits(value: object) -> tuple[Width, ...]:
    """Read 8, "fp8", "auto", "4,8" or [4, 8]; one width, or several to choose from.

    Raises:
        UsageError: no such width.
    """
    if isinstance(value, str):
        parts: Sequence[object] = [part.strip() for part in value.split(",")]
    elif isinstance(value, (list, tuple)):
        parts = value
    else:
        parts = [value]
    if list(parts) == [AUTO]:
        return (AUTO,)
    widths = [_width(part, value) for part in parts]
    if len(set(widths)) != len(widths) or not widths:
        raise UsageError(f"--bits {_shown(value)} names a width twice, or none.")
    return tuple(widths)


def _width(part: object, whole: object) -> Width:
    if isinstance(part, str) and part.lower() in FLOATS:
        return part.lower()
    text = str(part)
    if isinstance(part, bool) or not text.isdecimal() or int(text) not in INTEGERS:
        raise UsageError(
            f"--bits {_shown(whole)}: {part!r} is no width. Give one of "
            f"{', '.join(map(str, INTEGERS))}, {', '.join(FLOATS)}, auto, or several to choose "
            f"from for each operator, such as 4,8."
        )
    return int(text)


def _shown(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def dtype_of(width: Width, signed: bool) -> str:
    """Name of the format, a key of `FORMATS`."""
    if isinstance(width, str):
        return FLOATS[width]
    return f"{'int' if signed else 'uint'}{width}"


def spread(
    parameters: Mapping[str, int],
    losses: Mapping[str, Mapping[Width, float]],
    widths: Sequence[Width],
    average_bits: float,
) -> dict[str, Width]:
    """A width for each operator: the least loss whose weights take so many bits on average.

    The multiple-choice knapsack of HAWQ-V3 (Yao et al. 2021, arXiv 2011.10680, section 4.2), with
    size as the limit.

    Args:
        parameters: weights of each operator.
        losses: what each operator loses at each width, at least 0.
        widths: to choose from.
        average_bits: of all weights together, at most.

    Raises:
        UsageError: not even the smallest width is that small.
    """
    total = sum(parameters.values())
    sizes = [
        {str(w): parameters[name] * bits_of(w) / max(total, 1) for w in widths}
        for name in parameters
    ]
    costs = [{str(w): losses[name][w] for w in widths} for name in parameters]
    chosen = assign_within(costs, [[] for _ in costs], sizes, average_bits)
    by_text = {str(w): w for w in widths}
    return {name: by_text[text] for name, text in zip(parameters, chosen, strict=True)}


def bits_of(width: Width) -> int:
    """Bits of one value."""
    return FORMATS[dtype_of(width, signed=True)].bits
