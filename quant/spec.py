"""What a quantized tensor looks like: the format, and the numbers that go with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from compress.errors import UsageError

IntegerDType = Literal["int8", "uint8"]
Granularity = Literal["per_tensor", "per_channel"]


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


FORMATS: dict[str, IntegerFormat] = {
    "int8": IntegerFormat(8, True, "int8"),
    "uint8": IntegerFormat(8, False, "uint8"),
}
"""Every format there is; a new one is one more line here."""


@dataclass(frozen=True)
class QuantSpec:
    """How a tensor is to be quantized, before anything is known about its values.

    Attributes:
        dtype: the format, a key of `FORMATS`.
        symmetric: the zero point is fixed: 0, or the middle of an unsigned format whose
            tensor has negative values.
        reduced: leave one bit unused (int8 [-64, 63], uint8 [0, 127]), so that the sum of two
            products fits 16 bits on an x86 CPU without VNNI (`vpmaddubsw` saturates).
        restricted: leave out the most negative value ([-127, 127] for int8), the convention of
            TensorFlow Lite's weights and of oneDNN; PyTorch and ONNX use the full range.
        granularity: one scale for the tensor, or one for each index of an axis.
    """

    dtype: IntegerDType = "int8"
    symmetric: bool = True
    reduced: bool = False
    restricted: bool = False
    granularity: Granularity = "per_tensor"

    def __post_init__(self) -> None:
        if self.dtype not in FORMATS:
            raise UsageError(
                f"{self.dtype!r} is not a quantized format. Use one of {', '.join(FORMATS)}."
            )
        if self.granularity not in ("per_tensor", "per_channel"):
            raise UsageError(
                f"{self.granularity!r} is not a granularity. Use per_tensor or per_channel."
            )
        if self.restricted and not self.format.signed:
            raise UsageError(
                f"restricted=True leaves out the most negative value, which {self.dtype} does "
                "not have. Use a signed format, or restricted=False."
            )

    @property
    def format(self) -> IntegerFormat:
        """The integer grid of `dtype`."""
        return FORMATS[self.dtype]

    @property
    def bits(self) -> int:
        """Bits that are really used."""
        return self.format.bits - self.reduced

    @property
    def qmin(self) -> int:
        """Smallest integer."""
        return -(1 << (self.bits - 1)) + self.restricted if self.format.signed else 0

    @property
    def qmax(self) -> int:
        """Largest integer."""
        return (1 << (self.bits - self.format.signed)) - 1


@dataclass(frozen=True, eq=False)
class QParams:
    """The numbers that turn a tensor into integers: x ~ (q - zero_point) * scale.

    Attributes:
        spec: the format these numbers belong to.
        scale: float32, shape () per tensor or (C,) per channel; finite and above 0.
        zero_point: the format's storage type, same shape; within [qmin, qmax].
        axis: the tensor's axis of size C, or None per tensor.
    """

    spec: QuantSpec
    scale: np.ndarray
    zero_point: np.ndarray
    axis: int | None = None

    def __post_init__(self) -> None:
        scale = np.array(self.scale, dtype=np.float32)
        zero_point = np.array(self.zero_point)
        per_channel = self.spec.granularity == "per_channel"
        if per_channel != (self.axis is not None) or scale.ndim != int(per_channel):
            raise UsageError(
                f"A {self.spec.granularity} scale has shape {scale.shape} and axis {self.axis}. "
                "per_tensor needs shape () and axis None, per_channel needs (C,) and an axis."
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
