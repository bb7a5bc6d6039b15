"""NNCF as an engine: its quantization as passes, beside ours or instead of it.

NNCF (https://github.com/openvinotoolkit/nncf, the extra `nncf`) gets the float ONNX graph after
all rewrites, and its defaults are kept. What it raises is an error of the engine, so that it costs
one candidate and not the run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import numpy as np
import onnx_ir as ir

from compress.columns import whole_inputs
from compress.data import Batch
from compress.errors import DataError, UnsupportedError, UsageError
from compress.model import Arrays, Model
from compress.passes import Context
from compress.reference import reference_session, run
from compress.running import class_scores
from compress.target import Target
from quant.nncf_engine import CONVOLUTIONS, compressed, require_nncf

if TYPE_CHECKING:
    import onnx

Preset = Literal["performance", "mixed"]
ModelType = Literal["transformer"]
Device = Literal["ANY", "CPU", "GPU", "NPU"]
Mode = Literal["int8_sym", "int8_asym", "int4_sym", "int4_asym"]
_WEIGHTS_ONLY = "only its weight is quantized; it is computed with in float"


@dataclass(frozen=True, kw_only=True)
class NncfQuantize:
    """Post-training int8 quantization of weights and activations by `nncf.quantize`.

    Options and defaults are NNCF's. Ranges come from calibration data, one batch of 1 after the
    other (or of the size that the model fixes).

    Attributes:
        preset: "performance" is symmetric; "mixed" has asymmetric activations. None leaves the
            choice to NNCF: mixed for transformers, else performance.
        subset_size: calibration samples to use.
        fast_bias_correction: False corrects biases layer by layer, which takes longer.
        model_type: "transformer" has patterns of its own.
        target_device: what Q/DQ are placed for.
    """

    preset: Preset | None = None
    subset_size: int = 300
    fast_bias_correction: bool = True
    model_type: ModelType | None = None
    target_device: Device = "ANY"

    name: ClassVar[str] = "nncf_quantize"
    stage: ClassVar[Literal["onnx"]] = "onnx"
    makes: ClassVar[str] = "int8"

    def __post_init__(self) -> None:
        _check_choice("preset", self.preset, (None, *get_args(Preset)))
        _check_choice("model_type", self.model_type, (None, *get_args(ModelType)))
        _check_choice("target_device", self.target_device, get_args(Device))
        if self.subset_size < 1:
            raise UsageError(f"subset_size {self.subset_size} must be at least 1.")

    def check(self, model: Model, target: Target) -> None:
        """Refuse before any work.

        Raises:
            MissingExtraError: NNCF is not installed.
            UnsupportedError: the target has no int8.
        """
        require_nncf(self.name, target)

    def apply(self, model: Model, context: Context) -> Model:
        """The QDQ model as NNCF makes it; the step's details say what became int8.

        Raises:
            UnsupportedError: there are no calibration data.
            EngineError: NNCF failed, or what it made does not run.
        """
        batches = _batches(model, context, self.name, self.subset_size)

        def quantize(nncf: Any, graph: onnx.ModelProto) -> Any:
            dataset = nncf.Dataset(batches, _inputs)
            return nncf.quantize(graph, dataset, **self._arguments(nncf, batches))

        return compressed(self, model, context, quantize, _source(batches))

    def _arguments(self, nncf: Any, batches: Sequence[Batch]) -> dict[str, Any]:
        """For NNCF, which counts batches."""
        return {
            "preset": self.preset and nncf.QuantizationPreset(self.preset),
            "subset_size": len(batches),
            "fast_bias_correction": self.fast_bias_correction,
            "model_type": self.model_type and nncf.ModelType(self.model_type),
            "target_device": nncf.TargetDevice(self.target_device),
        }


@dataclass(frozen=True, kw_only=True)
class NncfQuantizeWithAccuracyControl(NncfQuantize):
    """`nncf.quantize_with_accuracy_control`: layers go back to float until the drop is allowed.

    The metric is top-1 on the calibration data where they have labels, else the share of samples
    with the same top-1 as in float. Operators are run as they are written, in no target's own
    arithmetic. NNCF ranks all layers by inference, so it takes minutes.

    Attributes:
        preset: see `NncfQuantize`, as for all that is not listed here.
        max_drop: of the metric, absolute: 0.01 is one point.
    """

    max_drop: float = 0.01

    name: ClassVar[str] = "nncf_quantize_with_accuracy_control"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.max_drop <= 1:
            raise UsageError(f"max_drop {self.max_drop} is a share of samples, 0 to 1.")

    def apply(self, model: Model, context: Context) -> Model:
        """The QDQ model with what NNCF left in float; the details hold the metric before and after.

        Raises:
            UnsupportedError: there are no calibration data, or no class scores to compare.
            EngineError: NNCF failed, what it made does not run, or nothing in it is int8.
        """
        batches = _batches(model, context, self.name, self.subset_size)
        details: dict[str, Any] = _source(batches)

        def quantize(nncf: Any, graph: onnx.ModelProto) -> Any:
            metric, labelled = _metric(self.name, graph, batches)
            dataset = nncf.Dataset(labelled, _inputs)
            made = nncf.quantize_with_accuracy_control(
                graph,
                dataset,
                dataset,
                _validate,
                max_drop=self.max_drop,
                **self._arguments(nncf, batches),
            )
            before, after = (_validate(one, labelled)[0] for one in (graph, made))
            kept = before - after <= self.max_drop + 1e-12
            details.update(metric=metric, before=before, after=after, max_drop_kept=kept)
            return made

        return compressed(self, model, context, quantize, details)


@dataclass(frozen=True, kw_only=True)
class NncfCompressWeights:
    """Weights of linear layers in 8 or 4 bits by `nncf.compress_weights`, computed with in float.

    Nothing is calibrated: files get smaller, and large layers are read faster. Convolutions stay
    as they are: NNCF 3.4 stores theirs with scales of a rank that DequantizeLinear does not take.

    Attributes:
        mode: of the weights; int4 keeps embeddings and the last layer in 8 bits.
        ratio: share of layers in 4 bits, the others have 8; None is all.
        group_size: weights that share a scale in 4 bits, -1 for a whole channel; None is 128.
        all_layers: embeddings and the last layer in 4 bits, too.
    """

    mode: Mode = "int8_asym"
    ratio: float | None = None
    group_size: int | None = None
    all_layers: bool | None = None

    name: ClassVar[str] = "nncf_compress_weights"
    stage: ClassVar[Literal["onnx"]] = "onnx"
    buys: ClassVar[Literal["size"]] = "size"

    def __post_init__(self) -> None:
        _check_choice("mode", self.mode, get_args(Mode))
        if self._format == "int8" and self._four_bits():
            raise UsageError(
                f"mode {self.mode} stores every weight in 8 bits and does not take "
                f"{', '.join(self._four_bits())}, which belong to int4_sym and int4_asym."
            )
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise UsageError(f"ratio {self.ratio} is a share of layers, above 0 and at most 1.")
        if self.group_size is not None and self.group_size != -1 and self.group_size < 1:
            raise UsageError(f"group_size {self.group_size} must be at least 1, or -1.")

    @property
    def makes(self) -> str:
        """The precision of the result, for reports."""
        return f"{self._format} weights"

    @property
    def _format(self) -> str:
        return self.mode.partition("_")[0]

    def check(self, model: Model, target: Target) -> None:
        """Refuse before any work.

        Raises:
            MissingExtraError: NNCF is not installed.
            UnsupportedError: the target has no int8, or does not store weights in int4.
        """
        require_nncf(self.name, target)
        if self._format not in ("int8", *target.capabilities.weight_only):
            raise UnsupportedError(
                f"Target {target.name} does not store weights in {self._format}. Use mode "
                f"int8_sym or int8_asym."
            )

    def apply(self, model: Model, context: Context) -> Model:
        """The model with compressed weights.

        Raises:
            EngineError: NNCF failed, what it made does not run, or nothing was compressed.
        """

        def compress(nncf: Any, graph: onnx.ModelProto) -> Any:
            return nncf.compress_weights(
                graph,
                mode=nncf.CompressWeightsMode(self.mode),
                ignored_scope=nncf.IgnoredScope(types=list(CONVOLUTIONS), validate=False),
                **self._four_bits(),
            )

        return compressed(self, model, context, compress, {}, _WEIGHTS_ONLY)

    def _four_bits(self) -> dict[str, Any]:
        given = {
            "ratio": self.ratio,
            "group_size": self.group_size,
            "all_layers": self.all_layers,
        }
        return {name: value for name, value in given.items() if value is not None}


def _check_choice(name: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        listed = ", ".join("null" if one is None else str(one) for one in allowed)
        raise UsageError(f"There is no {name} {value!r}; choose from {listed}.")


def _batches(model: Model, context: Context, name: str, count: int) -> list[Batch]:
    """Calibration batches of 1, or of the size that the model fixes.

    Raises:
        UnsupportedError: no calibration data were given.
        DataError: there is no whole batch among them.
    """
    data = context.calibration
    if data is None:
        raise UnsupportedError(
            f"Pass {name} takes ranges from calibration data, and there are none. Give "
            f"--calibration DATA, or use `quantize`, which can do without."
        )
    size = 1
    if not whole_inputs(model.inputs):
        size = next((spec.concrete()[0] for spec in model.inputs if spec.shape), 1)
    batches = [batch for batch in data.take(max(count, size)).batches(size) if len(batch) == size]
    if not batches:
        raise DataError(
            f"Calibration data {data.name} hold {len(data)} samples and the model takes batches "
            f"of {size}. Give at least {size} samples, or export the model with a dynamic batch."
        )
    return batches


def _inputs(batch: Batch) -> Arrays:
    return batch.inputs


def _source(batches: Sequence[Batch]) -> dict[str, Any]:
    return {"ranges_from": "calibration data", "samples": sum(map(len, batches))}


def _metric(
    name: str, graph: onnx.ModelProto, batches: Sequence[Batch]
) -> tuple[str, Sequence[Batch]]:
    """What accuracy is measured by, in words, and batches with the labels for it.

    Raises:
        UnsupportedError: the model does not tell classes.
    """
    found = list(_classes(graph, batches))
    if any(classes is None for _, classes in found):
        raise UnsupportedError(
            f"Pass {name} compares classes, and the model has no output (N, classes). Use "
            f"nncf_quantize."
        )
    if batches[0].labels is not None:
        return "top-1 on the labels of the calibration data", batches
    labelled = [dataclasses.replace(batch, labels=classes) for batch, classes in found]
    return "agreement with the float model's top-1 on the calibration data", labelled


def _validate(graph: onnx.ModelProto, batches: Iterable[Batch]) -> tuple[float, list[float]]:
    """Share of samples with the right class, 0..1: of all, and of each batch."""
    shares = [float(np.mean(found == batch.labels)) for batch, found in _classes(graph, batches)]
    return float(np.mean(shares)), shares


def _classes(
    graph: onnx.ModelProto, batches: Iterable[Batch]
) -> Iterator[tuple[Batch, np.ndarray | None]]:
    """Each batch with the classes (n,) that the model finds, or None where it tells none."""
    runtime = reference_session(ir.from_proto(graph))
    for batch in batches:
        scores = class_scores(run(runtime, batch.inputs))
        yield batch, None if scores is None else scores.argmax(1)
