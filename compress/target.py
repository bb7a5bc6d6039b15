"""Target and Engine: where a model runs, and the model built for it.

Protocols, not base classes: a third party needs nothing of ours to write one. Pause before
adding a method; profiling and prediction are functions over a target.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np

from compress.liveness import Program
from compress.model import Arrays, Model, TensorSpec

FLOATS = ("float32", "tf32", "bfloat16", "float16")
"""Precisions in which a whole float model is computed; "tf32" rounds factors of float32 products
to 10 bits of mantissa."""

Role = Literal[
    "matmul",
    "elementwise",
    "unary",
    "pool",
    "concat",
    "join",
    "same_scale",
    "integer",
    "transparent",
    "activation",
    "epilogue",
]
"""What quantization does to an operator:

matmul       multiply-accumulate with a weight or between two activations; int8 kernel
elementwise  two activations in, one out (Add, Mul); int8 kernel with three scales
unary        one activation in, one out, own output scale (Sigmoid, LeakyRelu)
pool         as unary, but an average: the output scale is its own
concat       all inputs and the output share one scale
join         the same, and the runtime carries the scale through: no Q/DQ behind it
same_scale   moves values without changing them, fused between DQ and Q by the runtime
integer      the same, but the runtime does not fuse it: it is emitted on the integer tensor
transparent  the same, and the runtime carries the scale through by itself: no Q/DQ behind it
activation   folded into the producer's output quantization when the range allows (Relu, Clip)
epilogue     computed in float inside the producer's int8 kernel: no Q/DQ in between
"""


@dataclass(frozen=True)
class FusablePattern:
    """One operator that the runtime executes in int8, and how it must be dressed in Q/DQ.

    Attributes:
        op: ONNX operator type, or "ChannelShuffle" for a Transpose that swaps axes 1 and 2 of 5.
        role: see `Role`.
        source: where the fact is from.
        float_output: the int8 kernel can write float32, so the output may stay unquantized.
        max_rank: largest rank of the first input that the kernel takes; None where any.
        float_operand: of two operands, one that an int8 kernel writes for this operator alone may
            stay float: the runtime fuses the operator into that kernel, or reads float anyway.
        symmetric: activations that it reads want zero point 0: where they have two signs, as int8.
        fused_operand: of two operands in int8, one that an int8 kernel writes for this operator
            alone stays float: the operator is computed inside that kernel.
        shared_scale: operands in int8 share one scale.
        after: of an epilogue, the roles that it may follow.
        constant_weight: of a product of two tensors, the second must be a constant.
    """

    op: str
    role: Role
    source: str
    float_output: bool = False
    max_rank: int | None = None
    float_operand: bool = False
    symmetric: bool = False
    fused_operand: bool = False
    shared_scale: bool = False
    after: tuple[Role, ...] = ("matmul",)
    constant_weight: bool = False


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """Facts about one target on one machine. Passes read these and nothing else about it.

    Attributes:
        source: where the facts are from.
        opset: ONNX opset to export to.
        precisions: what the target can execute, e.g. ("float32", "int8").
        activation: integer type of activations that the int8 kernels are fast with.
        asymmetric: int8 activations may have a zero point; those in uint8 always may.
        weight: integer type of weights.
        reduced_weights: weights use 7 of 8 bits, so that int16 accumulation cannot saturate.
        restricted_weights: weights leave out the most negative integer, -128 of int8.
        float_constants: only weights of multiply-accumulates are integers; biases and other
            constant operands stay float.
        needed_only: what a multiply-accumulate, an elementwise operator or an epilogue writes is
            quantized only where an operator in int8 reads it.
        dynamic: ranges of activations can be computed at run time (DynamicQuantizeLinear).
        per_channel: weights may have one scale per output channel.
        linear: what a linear layer on inputs of rank 3 and more is fastest as.
        convolved_pools: an average over a window is faster as a depthwise convolution.
        costly_moves: moving activations (transpose, channel shuffle) takes longer than additional
            multiply-accumulates that avoid it.
        int8_dot_product: the machine has an int8 dot-product instruction.
        patterns: operators that run in int8.
        weight_only: formats of weights that are stored and computed with in float.
        weight_groups: numbers of weights that may share a scale where such a format is understood
            only as ONNX's blocked DequantizeLinear before a linear layer; empty where ONNX
            Runtime's MatMulNBits is understood, with groups of any size.
        channel_multiple: numbers of channels that are multiples of it use the units that multiply
            fully, in every precision; 1 where no such number is known.
        sparsity: patterns of zeros in weights that its kernels can skip, such as "2:4".
        own_precisions: precisions below 16 bits that the runtime makes of a float model by itself,
            under its option `precision`; None where passes quantize for it, operator by operator.
        profiler: the runtime tells the time of each kernel.
        notes: sentences for the user before work starts.
    """

    source: str
    opset: int
    precisions: tuple[str, ...]
    activation: Literal["uint8", "int8"] = "uint8"
    asymmetric: bool = False
    weight: Literal["int8"] = "int8"
    reduced_weights: bool = False
    restricted_weights: bool = False
    float_constants: bool = False
    needed_only: bool = False
    dynamic: bool = True
    per_channel: bool = True
    linear: Literal["Gemm", "MatMul"] = "MatMul"
    convolved_pools: bool = True
    costly_moves: bool = False
    int8_dot_product: bool = True
    patterns: tuple[FusablePattern, ...] = ()
    weight_only: tuple[str, ...] = ()
    weight_groups: tuple[int, ...] = ()
    channel_multiple: int = 1
    sparsity: tuple[str, ...] = ()
    own_precisions: tuple[str, ...] | None = None
    profiler: bool = True
    notes: tuple[str, ...] = ()

    @property
    def symmetric_activations(self) -> bool:
        """Whether zero points of activations are 0."""
        return self.activation == "int8" and not self.asymmetric

    def pattern(self, op: str) -> FusablePattern | None:
        """The pattern of one operator type, or None where it stays float."""
        return next((pattern for pattern in self.patterns if pattern.op == op), None)


@dataclass(frozen=True)
class Check:
    """Whether a target can be used here; if not, why and what to install."""

    available: bool
    reason: str = ""
    install: str = ""


@dataclass(frozen=True)
class TensorType:
    """A tensor that a kernel reads or writes, with its axes as the runtime lays them out.

    Sizes of -1 are unknown.
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """Bytes of it, where unknown sizes count as 1."""
        bits = _BITS.get(self.dtype)
        bits = 8 * np.dtype(self.dtype).itemsize if bits is None else bits
        return math.ceil(math.prod(map(abs, self.shape)) * bits / 8)


_BITS = {
    "bfloat16": 16, "float8": 8, "uint4": 4, "int4": 4, "uint2": 2, "int2": 2, "string": 0,
    "dynamic": 0,
}  # fmt: skip
"""Of the element types that numpy does not have; OpenVINO calls "dynamic" what it does not know."""


@dataclass(frozen=True)
class KernelTensors:
    """What a kernel moves: activations read, weights and other constants, activations written."""

    inputs: tuple[TensorType, ...]
    weights: tuple[TensorType, ...]
    outputs: tuple[TensorType, ...]

    @property
    def bytes(self) -> int:
        """Bytes of all of them, each moved once."""
        return sum(one.bytes for one in (*self.inputs, *self.weights, *self.outputs))


@dataclass(frozen=True)
class Kernel:
    """One kernel of a built engine, after the runtime's own fusions.

    Attributes:
        name: the runtime's name.
        op_type: the runtime's operator, e.g. "QLinearConv".
        precision: one of `FLOATS`, "int8", "float8", "move" (layout or shape only) or "convert"
            (Q, DQ, casts).
        site: name of the site that it executes, or "" for what the runtime inserted.
        backend: who executes it, where the runtime hands parts to a backend; "" for what the
            runtime executes itself.
        fused: operators computed inside it besides its own, e.g. "Add+Relu", as far as the runtime
            tells.
        tensors: what it reads and writes; None where the runtime does not tell.
    """

    name: str
    op_type: str
    precision: str
    site: str = ""
    backend: str = ""
    fused: str = ""
    tensors: KernelTensors | None = None


@dataclass(frozen=True)
class KernelTime:
    """Time of one kernel: median over runs, in microseconds, under the runtime's profiler."""

    kernel: Kernel
    p50_us: float


@runtime_checkable
class Engine(Protocol):
    """A model built for a target. Synchronous: a call returns when the outputs are ready."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Run once. Arrays by name in, arrays by name out."""

    def save(self, directory: Path) -> list[Path]:
        """Write what the runtime needs into `directory`; the files written."""

    def kernels(self) -> tuple[Kernel, ...]:
        """What the runtime made of the model, in order of execution."""

    def profile(self, inputs: Mapping[str, np.ndarray], runs: int = 20) -> tuple[KernelTime, ...]:
        """Time per kernel, in order of execution; empty where the runtime has no profiler."""


@runtime_checkable
class Target(Protocol):
    """Where an artifact runs. Its dataclass fields are its options."""

    name: ClassVar[str]

    @property
    def capabilities(self) -> Capabilities:
        """Facts about this target on this machine."""

    def check(self) -> Check:
        """Whether it can be used here; cheap, never raises."""

    def build(self, model: Model) -> Engine:
        """An engine from a model at the ONNX stage.

        Raises:
            EngineError: the runtime refuses the model.
        """

    def load(self, directory: Path) -> Engine:
        """The engine that `Engine.save` wrote into `directory`."""


@runtime_checkable
class Isolated(Protocol):
    """A target whose runtime has been seen to crash; models are first built in another process."""

    isolated: ClassVar[bool]


@runtime_checkable
class Elsewhere(Protocol):
    """A target whose artifact runs on another device: speed measured here decides nothing."""

    elsewhere: ClassVar[bool]


@runtime_checkable
class Shipped(Protocol):
    """An engine whose artifact goes to another device."""

    @property
    def shipped_bytes(self) -> int:
        """Of the file that the device needs; others of the artifact serve the way there."""

    def remarks(self) -> tuple[str, ...]:
        """Sentences for the report: what was checked for the device, and how to run it there."""


@runtime_checkable
class Prepared(Protocol):
    """An isolated target whose builds begin with long work that cannot crash and that it keeps."""

    def prepare(self, model: Model) -> None:
        """Do that work here, so that the other process finds it done.

        Raises:
            EngineError: the model is refused.
        """


@runtime_checkable
class ManyRuntimes(Protocol):
    """A target that several runtimes can serve; each is a target of its own."""

    def runtimes(self) -> tuple[Target, ...]:
        """Those that can be used here, the reference for speed-ups first."""

    def missing(self) -> Mapping[str, Check]:
        """Those that cannot, by name, with the reason."""


@runtime_checkable
class OnDevice(Protocol):
    """An engine whose device has a memory of its own, so that copies can be left out of a time."""

    def on_device(self, inputs: Mapping[str, np.ndarray]) -> Callable[[], object]:
        """A function that runs once on inputs that are on the device, and leaves outputs there."""


@runtime_checkable
class Adjustable(Protocol):
    """A target with settings that change speed and not results."""

    def settings(self) -> tuple[Target, ...]:
        """Itself with other settings, the most promising first."""


@runtime_checkable
class BuiltElsewhere(Target, Protocol):
    """A target whose engines may have to be built on another machine, the one with its hardware.

    `check` says whether they can be built here. `compress run` makes, judges and writes the input
    of the build anywhere; `compress build` builds where the hardware is. A field `batch`, where
    the target has one, is set to the batch that is asked for.
    """

    def check_input(self, model: Model) -> tuple[str, ...]:
        """What the builder should know of a candidate's graph, which is fit to be built.

        Raises:
            UnsupportedError: it breaks rules of the target; the message names them.
        """

    def build_sheet(self, inputs: tuple[TensorSpec, ...]) -> Mapping[str, Any]:
        """How it is to be built, as plain values for people and other tools."""

    def builder(self) -> Mapping[str, str]:
        """Library and hardware that build here, by name; engines of other builders do not load."""

    def build_in(self, model: Model, folder: Path) -> Engine:
        """`build`, with what one build learns for the next (timing caches) kept in `folder`.

        Raises:
            EngineError: the runtime refuses the model.
        """


@runtime_checkable
class DeviceTimed(Protocol):
    """An engine on a device with a clock of its own."""

    def timed(self, inputs: Mapping[str, np.ndarray]) -> Callable[[], float]:
        """A function that runs once on inputs that lie on the device, and returns its seconds."""


@runtime_checkable
class Scheduled(Protocol):
    """An engine that knows the order in which its kernels run, and what each allocates."""

    def schedule(self, batch: int = 1) -> Program | None:
        """For requests of that size, inputs held by the caller; None where sizes are not known."""


@runtime_checkable
class MemoryMeasured(Protocol):
    """An engine whose runtime tells how much memory it takes for activations."""

    def memory_in_use(self, inputs: Mapping[str, np.ndarray]) -> int | None:
        """The most bytes at once during one run by the runtime's own account, inputs included.

        Weights and code are left out. None where this machine cannot tell.
        """


def runtimes(target: Target) -> tuple[Target, ...]:
    """The targets that a target chooses from: itself, where it is one runtime."""
    return target.runtimes() if isinstance(target, ManyRuntimes) else (target,)
