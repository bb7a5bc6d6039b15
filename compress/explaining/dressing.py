"""How Q/DQ dress the operators of a graph that some tool quantized, and what stands in the way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx_ir as ir

from compress.target import Capabilities

MULTIPLIES = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_Q, _DQ = "QuantizeLinear", "DequantizeLinear"
_FLOAT_OUTPUT = ("Gemm", "MatMul")
_LOOKED_THROUGH = ("Pad", "Reshape", "Transpose", "Squeeze", "Unsqueeze")
"""ONNX Runtime folds a Pad into a convolution, and carries integers through the others."""
_LONGEST_CHAIN = 4
"""Conv, BatchNormalization, Add, Relu."""


@dataclass(frozen=True)
class Obstacle:
    """Why a dressed operator is not fused.

    Attributes:
        kind: for programs.
        text: what stands in the way, to follow "because".
        advice: how to make it fit, or "".
    """

    kind: str
    text: str
    advice: str = ""


@dataclass(frozen=True)
class Dressing:
    """What a graph says about its Q/DQ.

    Attributes:
        ends: by conversion, the operators before it and those behind it; other conversions are
            looked through. "" stands for the model's inputs and outputs.
        types: operator type by name.
        chains: by operator without a weight, the multiply-accumulate whose result it completes.
        dressed: multiply-accumulates with a DequantizeLinear before them.
        obstacles: of those, what the runtime cannot fuse.
        shape_only: conversions whose result serves to read its shape alone.
    """

    ends: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    chains: dict[str, str] = field(default_factory=dict)
    dressed: frozenset[str] = frozenset()
    obstacles: dict[str, Obstacle] = field(default_factory=dict)
    shape_only: frozenset[str] = frozenset()


def dressing(graph_model: ir.Model, facts: Capabilities) -> Dressing:
    """Read the Q/DQ of a graph against what ONNX Runtime's transformer fuses.

    The rules were read off its optimized graphs, one planted obstacle at a time.
    """
    nodes = [node for node in graph_model.graph if node.op_type != "Constant"]
    conversions = [node for node in nodes if node.op_type in (_Q, _DQ)]
    dressed = {
        node.name or ""
        for node in nodes
        if node.op_type in MULTIPLIES and any(_dequantized(value) for value in node.inputs)
    }
    found = {name: obstacle(node, facts) for node in nodes if (name := node.name or "") in dressed}
    return Dressing(
        {node.name or "": _ends(node) for node in conversions},
        {node.name or "": node.op_type for node in nodes},
        {node.name or "": owner for node in nodes if (owner := _chain(node))},
        frozenset(dressed),
        {name: one for name, one in found.items() if one is not None},
        frozenset(node.name or "" for node in conversions if _only_shape(node)),
    )


def obstacle(node: ir.Node, facts: Capabilities) -> Obstacle | None:
    """What keeps ONNX Runtime from fusing a multiply-accumulate with its Q/DQ; None for nothing."""
    pattern = facts.pattern(node.op_type)
    if pattern is None:
        return Obstacle("no kernel", f"{node.op_type} has no int8 kernel in this runtime")
    steps = (_before(node), _float_bias(node), _behind(node))
    found = [one for one in steps if one is not None]
    if not found:
        return None
    # What is fixed alone leaves the operator where it is.
    return Obstacle(
        " and ".join(one.kind for one in found),
        ", and ".join(one.text for one in found),
        "; ".join(dict.fromkeys(one.advice for one in found if one.advice)),
    )


def _before(node: ir.Node) -> Obstacle | None:
    """What is wrong with the inputs."""
    values = [value for value in node.inputs[:2] if value is not None]
    plain = [value for value in values if not _dequantized(value)]
    if plain:
        moved = _moved(plain[0])
        if moved:
            return Obstacle(
                f"{moved} before",
                f"{moved} stands between its input's {_DQ} and it",
                f"quantize what {moved} gives as well, so that it moves integers",
            )
        what = "weight" if plain[0].const_value is not None else "input"
        return Obstacle(
            f"float {what}",
            f"its {what} is not quantized",
            f"quantize its {what} too, or leave the whole operator in float",
        )
    sources = [source for value in values if (source := _dequantizer(value)) is not None]
    scales = [
        source.inputs[1]
        for source in sources
        if source.inputs[0] is not None and source.inputs[0].const_value is None
    ]
    for scale in scales:
        count = scale.const_value.size if scale is not None and scale.const_value is not None else 1
        if count > 1:
            return Obstacle(
                "scale per channel",
                f"the scale of its input has {count} values, one per channel, and the int8 kernel "
                f"takes one for the whole tensor",
                "quantize activations with one scale per tensor",
            )
    return None


def _moved(value: ir.Value) -> str:
    """An operator that moves values in float between a DequantizeLinear and an input, or ""."""
    node = value.producer()
    moves = node is not None and node.op_type == "Flatten"
    return node.op_type if node is not None and moves and _dequantized(node.inputs[0]) else ""


def _float_bias(node: ir.Node) -> Obstacle | None:
    """A Gemm without QuantizeLinear behind it wants its bias as integers; others take a float."""
    bias = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
    if bias is None or _dequantized(bias):
        return None
    if any(use.node.op_type == _Q for use in node.outputs[0].uses()):
        return None
    return Obstacle(
        "float bias",
        f"its bias is float and no {_Q} stands behind it",
        f"quantize its bias (int32, scale of input times scale of weight), or put {_Q} and {_DQ} "
        f"behind it",
    )


def _behind(node: ir.Node) -> Obstacle | None:
    """What is wrong with the output."""
    out = node.outputs[0]
    readers = [use.node for use in out.uses()]
    if out.is_graph_output() and node.op_type not in _FLOAT_OUTPUT:
        return Obstacle(
            "model output",
            "its result leaves the model in float, and the int8 kernel writes integers",
            "quantize the output of the model, or leave the operator in float",
        )
    others = list(dict.fromkeys(r.op_type for r in readers if r.op_type != _Q))
    quantized = any(reader.op_type == _Q for reader in readers)
    if not others:
        return None
    if quantized or len(readers) > 1:
        return Obstacle(
            "read in float",
            f"its result is also read in float, by {' and '.join(others)}",
            f"put {_Q} and {_DQ} behind the operator, so that {' and '.join(others)} reads the "
            f"same integers",
        )
    chain = list(_until_quantized(readers[0]))
    last = chain[-1].outputs[0] if chain else out
    if any(use.node.op_type == _Q for use in last.uses()):
        # A Relu alone is free: integers with zero point 0 saturate as it does.
        names = list(dict.fromkeys(n.op_type for n in chain))
        if names == ["Relu"] and (count := _scales(last)) > 1:
            return Obstacle(
                "Relu before a scale per channel",
                f"Relu stands between it and a {_Q} with {count} scales, one per channel, that "
                f"cannot take the Relu's place",
                "quantize activations with one scale per tensor",
            )
        if names == ["Relu"]:
            return None
        between = " and ".join(names)
        fold = "BatchNormalization" in between
        return Obstacle(
            f"{between} between",
            f"{between} {'stand' if len(names) > 1 else 'stands'} between it and its {_Q}",
            "fold BatchNormalization into the weights before quantizing (`compress run` does, and "
            "so does onnxruntime's quant_pre_process)"
            if fold
            else f"quantize the result of the operator itself, or choose a range that makes "
            f"{between} a saturation",
        )
    if node.op_type in _FLOAT_OUTPUT:
        return None
    return Obstacle(
        "float output",
        f"its result is read in float by {' and '.join(others)}, and the int8 kernel writes "
        f"integers",
        f"put {_Q} and {_DQ} behind it, or leave it in float",
    )


def _scales(value: ir.Value) -> int:
    """The most scales of a QuantizeLinear that reads a tensor."""
    scales = [use.node.inputs[1] for use in value.uses() if use.node.op_type == _Q]
    sizes = [s.const_value.size for s in scales if s is not None and s.const_value is not None]
    return max(sizes, default=1)


def _until_quantized(node: ir.Node) -> Iterator[ir.Node]:
    """A chain of operators with one reader each, as long as none of them multiplies."""
    for _ in range(_LONGEST_CHAIN):
        if node.op_type in (*MULTIPLIES, _Q, _DQ):
            return
        yield node
        readers = [use.node for use in node.outputs[0].uses()]
        if len(readers) != 1:
            return
        node = readers[0]


def _dequantized(value: ir.Value | None) -> bool:
    return _dequantizer(value) is not None


def _dequantizer(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that an input comes from, also through moves of integers."""
    node = value.producer() if value is not None else None
    if node is not None and node.op_type in _LOOKED_THROUGH:
        return _dequantizer(node.inputs[0])
    return node if node is not None and node.op_type == _DQ else None


def _ends(node: ir.Node) -> tuple[tuple[str, ...], tuple[str, ...]]:
    before = tuple(dict.fromkeys(_sources(node.inputs[0])))
    behind = tuple(dict.fromkeys(name for out in node.outputs for name in _readers(out)))
    return before, behind


def _sources(value: ir.Value | None) -> Iterator[str]:
    """What writes a tensor; conversions are looked through, constants have nobody."""
    if value is None or value.const_value is not None:
        return
    node = value.producer()
    if node is not None and node.op_type in (_Q, _DQ):
        yield from _sources(node.inputs[0])
    else:
        yield (node.name or "") if node is not None else ""


def _readers(value: ir.Value) -> Iterator[str]:
    if value.is_graph_output():
        yield ""
    for use in value.uses():
        if use.node.op_type in (_Q, _DQ):
            yield from (name for out in use.node.outputs for name in _readers(out))
        else:
            yield use.node.name or ""


def _chain(node: ir.Node) -> str:
    """The multiply-accumulate before operators that read its result alone, or ""."""
    if node.op_type in (*MULTIPLIES, _Q, _DQ):
        return ""
    last: ir.Node | None = node
    for _ in range(_LONGEST_CHAIN):
        value = next(iter(last.inputs), None) if last is not None else None
        last = value.producer() if value is not None else None
        if last is None or last.op_type in (_Q, _DQ):
            return ""
        if last.op_type in MULTIPLIES:
            return last.name or ""
    return ""


def _only_shape(node: ir.Node) -> bool:
    readers = [use.node.op_type for out in node.outputs for use in out.uses()]
    outputs = any(out.is_graph_output() for out in node.outputs)
    return bool(readers) and not outputs and set(readers) <= {"Shape", "Size"}
