"""What a quantized tensor looks like: the format, and the numbers that go with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np

from compress.errors import UsageError

IntegerDType = Literal[
    "int2", "int3", "int4", "int5", "int6", "int7", "int8", "int16",
    "uint2", "uint3", "uint4", "uint5", "uint6", "uint7", "uint8", "uint16",
]  # fmt: skip
FloatDType = Literal["float4_e2m1", "float8_e4m3fn", "float8_e5m2", "float16", "bfloat16"]
DType = IntegerDType | FloatDType
Granularity = Literal["per_tensor", "per_channel", "per_group"]


@dataclass(frozen=True)
class IntegerFormat:
    """An integer grid.

    Attributes:
        bits: width of one value.
        signed: two's complement if true.
        storage: numpy's name of the element type that holds a value.
    """

    bits: int
    signed: bool
    storage: str


@dataclass(frozen=True)
class FloatFormat:
    """A floating-point grid with a sign bit and subnormals, without its infinities and NaNs.

    Normal values are +-2**(e - bias) (1 + m / 2**mantissa_bits) for e from 1 up to that of `max`;
    below 2**(1 - bias) the values keep the spacing of the smallest normal ones.

    Attributes:
        exponent_bits: width of e.
        mantissa_bits: width of m.
        bias: of the exponent.
        max: largest value; what lies beyond saturates.
        storage: numpy's name of the element type that holds a value.
    """

    exponent_bits: int
    mantissa_bits: int
    bias: int
    max: float
    storage: str = "float32"

    @property
    def bits(self) -> int:
        """Width of one value."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def signed(self) -> bool:
        """Always: a float has a sign bit."""
        return True


FORMATS: dict[str, IntegerFormat | FloatFormat] = {
    "int2": IntegerFormat(2, True, "int8"),
    "int3": IntegerFormat(3, True, "int8"),
    "int4": IntegerFormat(4, True, "int8"),
    "int5": IntegerFormat(5, True, "int8"),
    "int6": IntegerFormat(6, True, "int8"),
    "int7": IntegerFormat(7, True, "int8"),
    "int8": IntegerFormat(8, True, "int8"),
    "int16": IntegerFormat(16, True, "int16"),
    "uint2": IntegerFormat(2, False, "uint8"),
    "uint3": IntegerFormat(3, False, "uint8"),
    "uint4": IntegerFormat(4, False, "uint8"),
    "uint5": IntegerFormat(5, False, "uint8"),
    "uint6": IntegerFormat(6, False, "uint8"),
    "uint7": IntegerFormat(7, False, "uint8"),
    "uint8": IntegerFormat(8, False, "uint8"),
    "uint16": IntegerFormat(16, False, "uint16"),
    "float4_e2m1": FloatFormat(2, 1, 1, 6.0),
    "float8_e4m3fn": FloatFormat(4, 3, 7, 448.0),
    "float8_e5m2": FloatFormat(5, 2, 15, 57344.0),
    "float16": FloatFormat(5, 10, 15, 65504.0),
    "bfloat16": FloatFormat(8, 7, 127, (2 - 2.0**-7) * 2.0**127),
}
"""Every format there is; a new one is one more line here.

Floats of 8 bits: Micikevicius et al., arXiv 2209.05433; of 4 bits: OCP Microscaling Formats
(MX) specification 1.0.
"""


@dataclass(frozen=True)
class QuantSpec:
    """How a tensor is to be quantized, before anything is known about its values.

    Attributes:
        dtype: the format, a key of `FORMATS`.
        symmetric: the zero point is fixed: 0, or the middle of an unsigned format whose
            tensor has negative values. A float format is always symmetric.
        reduced: leave one bit unused (int8 [-64, 63], uint8 [0, 127]), so that the sum of two
            products fits 16 bits on an x86 CPU without VNNI (`vpmaddubsw` saturates).
        restricted: leave out the most negative value ([-127, 127] for int8), the convention of
            TensorFlow Lite's weights and of oneDNN; PyTorch and ONNX use the full range.
        granularity: one scale for the tensor, for each index of an axis, or for each group of
            consecutive elements along an axis (ONNX's blocked quantization).
        group: elements in such a group; None for the other granularities.
        power_of_two: scales are powers of two, rounded up so that the range still fits: a
            multiplication by one is a shift.
        dynamic: the range is found at run time, for each input anew.
    """

    dtype: DType = "int8"
    symmetric: bool = True
    reduced: bool = False
    restricted: bool = False
    granularity: Granularity = "per_tensor"
    group: int | None = None
    power_of_two: bool = False
    dynamic: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in FORMATS:
            raise UsageError(
                f"{self.dtype!r} is not a quantized format. Use one of {', '.join(FORMATS)}."
            )
        if self.granularity not in get_args(Granularity):
            raise UsageError(
                f"{self.granularity!r} is not a granularity. Use one of "
                f"{', '.join(get_args(Granularity))}."
            )
        self._check_group()
        if not self.integer and (not self.symmetric or self.reduced or self.restricted):
            raise UsageError(
                f"{self.dtype} is a float format: it has the zero point 0 and all of its values. "
                f"Use symmetric=True, reduced=False and restricted=False; got {self.symmetric}, "
                f"{self.reduced} and {self.restricted}."
            )
        if self.restricted and not self.format.signed:
            raise UsageError(
                f"restricted=True leaves out the most negative value, which {self.dtype} does "
                "not have. Use a signed format, or restricted=False."
            )
        if self.bits < 2:
            raise UsageError(
                f"reduced=True leaves {self.bits} bit of {self.dtype}, and a symmetric grid needs "
                "2. Use a wider format, or reduced=False."
            )

    def _check_group(self) -> None:
        grouped = self.granularity == "per_group"
        if grouped and not (isinstance(self.group, int) and self.group >= 2):
            raise UsageError(
                f"per_group needs group, the number of elements that share a scale; got "
                f"{self.group!r}. Use at least 2, for example group=32."
            )
        if not grouped and self.group is not None:
            raise UsageError(
                f"group={self.group!r} has no meaning {self.granularity}. Leave it out, or use "
                "granularity='per_group'."
            )

    @property
    def format(self) -> IntegerFormat | FloatFormat:
        """The grid of `dtype`."""
        return FORMATS[self.dtype]

    @property
    def integer(self) -> bool:
        """Whether the grid holds integers."""
        return isinstance(self.format, IntegerFormat)

    @property
    def bits(self) -> int:
        """Bits that are really used."""
        return self.format.bits - self.reduced

    @property
    def qmin(self) -> float:
        """Smallest value of the grid; an int where the grid holds integers."""
        if isinstance(self.format, FloatFormat):
            return -self.format.max
        return -(1 << (self.bits - 1)) + self.restricted if self.format.signed else 0

    @property
    def qmax(self) -> float:
        """Largest value of the grid; an int where the grid holds integers."""
        if isinstance(self.format, FloatFormat):
            return self.format.max
        return (1 << (self.bits - self.format.signed)) - 1


@dataclass(frozen=True, eq=False)
class QParams:
    """The numbers that turn a tensor into values of a format: x ~ (q - zero_point) * scale.

    Attributes:
        spec: the format these numbers belong to.
        scale: float32, finite and above 0; shape () per tensor, (C,) per channel, and per group
            the tensor's own shape with `axis` divided by the size of a group.
        zero_point: the format's storage type, same shape; within [qmin, qmax]; 0 for a float.
        axis: the tensor's axis of size C or the one cut into groups, or None per tensor.
    """

    spec: QuantSpec
    scale: np.ndarray
    zero_point: np.ndarray
    axis: int | None = None

    def __post_init__(self) -> None:
        scale = np.array(self.scale, dtype=np.float32)
        zero_point = np.array(self.zero_point)
        if not _fits(self.spec.granularity, scale.ndim, self.axis):
            raise UsageError(
                f"A {self.spec.granularity} scale has shape {scale.shape} and axis {self.axis}. "
                "per_tensor needs shape () and axis None, per_channel needs (C,) and an axis, "
                "per_group needs the tensor's rank and one of its axes."
            )
        if zero_point.shape != scale.shape:
            raise UsageError(
                f"The zero point has shape {zero_point.shape} and the scale {scale.shape}. "
                "Give both the same shape."
            )
        if not (np.isfinite(scale).all() and (scale > 0).all()):
            raise UsageError(
                f"A scale must be finite and above 0; the smallest is {scale.min()} and the "
                f"largest {scale.max()}. Check the range that it was made from."
            )
        if ((zero_point < self.spec.qmin) | (zero_point > self.spec.qmax)).any():
            raise UsageError(
                f"A zero point must be within [{self.spec.qmin}, {self.spec.qmax}] for "
                f"{self.spec}; got [{zero_point.min()}, {zero_point.max()}]."
            )
        if not self.spec.integer and zero_point.any():
            raise UsageError(
                f"{self.spec.dtype} is a float format, so its zero point is 0; got "
                f"[{zero_point.min()}, {zero_point.max()}]. Leave the zero point at 0."
            )
        zero_point = zero_point.astype(self.spec.format.storage)
        for array, field in ((scale, "scale"), (zero_point, "zero_point")):
            array.setflags(write=False)
            object.__setattr__(self, field, array)

    def __eq__(self, other: object) -> bool:
        """Equal to the last bit."""
        if not isinstance(other, QParams):
            return NotImplemented
        return (
            (self.spec, self.axis) == (other.spec, other.axis)
            and np.array_equal(self.scale, other.scale)
            and np.array_equal(self.zero_point, other.zero_point)
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; every float32 is exact as a Python float."""
        return {
            "spec": asdict(self.spec),
            "scale": self.scale.tolist(),
            "zero_point": self.zero_point.tolist(),
            "axis": self.axis,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QParams:
        """The inverse of `to_dict`.

        Raises:
            UsageError: a value is not allowed.
        """
        return cls(
            spec=QuantSpec(**values["spec"]),
            scale=np.asarray(values["scale"], dtype=np.float32),
            zero_point=np.asarray(values["zero_point"], dtype=np.int64),
            axis=values["axis"],
        )


def _fits(granularity: Granularity, rank: int, axis: int | None) -> bool:
    """Whether a scale of this rank belongs to the granularity."""
    if granularity == "per_tensor":
        return rank == 0 and axis is None
    if granularity == "per_channel":
        return rank == 1 and axis is not None
    return axis is not None and -rank <= axis < rank
