"""ONNX Runtime's own tools on one model: `python -m targets.ort_mobile_tools model.onnx model.ort`.

A process of its own, because importing them changes the import path and the logging. The last
line on stdout is JSON:

    configs         text by file name, from `onnxruntime.tools.ort_format_model`
    coreml          verdicts of `onnxruntime.tools.mobile_helpers.usability_checker`, in words
    xnnpack         nodes, supported, partitions and unsupported operators, counted by the same
    dynamic_inputs  names of inputs without a fixed shape
    failure         why the checker gave no verdict, or ""
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import onnx

CONFIGS = ("required_operators.config", "required_operators_and_types.config")
"""What `build.sh --include_ops_by_config` takes; the second, with the types of each operator, also
wants `--enable_reduced_operator_type_support`."""
XNNPACK = frozenset(
    [
        "AveragePool", "Conv", "ConvTranspose", "MaxPool", "Softmax", "Resize", "Gemm", "MatMul",
    ]
)  # fmt: skip
XNNPACK_INT8 = XNNPACK - {"Gemm", "MatMul"}
"""Between DequantizeLinear and QuantizeLinear. Both lists: ONNX Runtime documentation, "XNNPACK
Execution Provider", supported ops; onnxruntime/core/providers/xnnpack/detail/utils.cc."""
_FUSED = ("Relu", "Clip")
_FUSES = ("Conv", "MaxPool")
_CONVERSIONS = ("QuantizeLinear", "DequantizeLinear")


class XnnpackOperators:
    """Which nodes the XNNPACK provider takes, by their operators; for ONNX Runtime's checker.

    As in ONNX Runtime's own lists, what else an operator needs (2-D, constant weights) is not
    looked at.
    """

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._makers = {name: node for node in graph.node for name in node.output}
        self._readers: dict[str, list[str]] = {}
        for node in graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node.op_type)

    def is_op_supported(self, node: onnx.NodeProto) -> bool:
        """Called by the checker for each node."""
        if node.domain not in ("", "ai.onnx"):
            return False
        if node.op_type in _FUSED:
            maker = self._makers.get(node.input[0])
            return maker is not None and maker.op_type in _FUSES and self.is_op_supported(maker)
        if node.op_type in _CONVERSIONS:
            return self._in_group(node)
        return node.op_type in (XNNPACK_INT8 if self._reads_int8(node) else XNNPACK)

    def get_caveats(self) -> list[str]:
        """Part of what the checker expects."""
        return []

    def _reads_int8(self, node: onnx.NodeProto) -> bool:
        maker = self._makers.get(node.input[0]) if node.input else None
        return maker is not None and maker.op_type == "DequantizeLinear"

    def _in_group(self, node: onnx.NodeProto) -> bool:
        """Whether Q or DQ belong to an operator that runs in int8."""
        if node.op_type == "DequantizeLinear":
            return any(op in XNNPACK_INT8 for op in self._readers.get(node.output[0], []))
        maker = self._makers.get(node.input[0])
        return maker is not None and self._reads_int8(maker) and maker.op_type in XNNPACK_INT8


def configs(packed: Path) -> dict[str, str]:
    """What a reduced build must have, without and with the types of each operator."""
    from onnxruntime.tools.ort_format_model import create_config_from_models

    texts = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, types in zip(CONFIGS, (False, True), strict=True):
            create_config_from_models([packed], Path(folder) / name, types)
            texts[name] = (Path(folder) / name).read_text(encoding="utf-8")
    return texts


def usability(model: Path) -> dict[str, Any]:
    """What `onnxruntime.tools.check_onnx_model_mobile_usability` looks at, without NNAPI."""
    from onnxruntime.tools.mobile_helpers import usability_checker as checker
    from onnxruntime.tools.onnx_model_utils import ModelProtoWithShapeInfo, optimize_model

    with tempfile.TemporaryDirectory() as folder:
        basic = Path(folder) / "basic.onnx"
        optimize_model(model, basic, use_external_initializers=True)
        proto = ModelProtoWithShapeInfo(basic).model_with_shape_info
    dynamic, _ = checker.check_shapes(proto.graph)
    verdicts = {
        kind: checker.check_coreml_partitions(
            proto, not dynamic, f"coreml_supported_{kind.lower()}_ops.md"
        ).suitability()
        for kind in ("MLProgram", "NeuralNetwork")
    }
    taken = checker.check_partitioning(proto.graph, XnnpackOperators(proto.graph), False)
    fixed = " once its shapes are fixed" if dynamic else ""
    return {
        "coreml": ", ".join(f"{k} {v.name.lower()}{fixed}" for k, v in verdicts.items()),
        "xnnpack": {
            "nodes": taken.num_nodes,
            "supported": taken.num_supported_nodes,
            "partitions": taken.num_partitions,
            "unsupported": sorted(one.split(":")[-1] for one in taken.unsupported_ops),
        },
        "dynamic_inputs": [value.name for value in dynamic],
        "failure": "",
    }


def main(model: str, packed: str) -> None:
    """Print what was found; the checker may fail, the configs may not."""
    found: dict[str, Any] = {"configs": configs(Path(packed))}
    logging.disable()
    try:
        found |= usability(Path(model))
    except Exception as error:  # a checker of another project must not cost the artifact
        found["failure"] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
