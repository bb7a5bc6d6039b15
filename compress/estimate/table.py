"""The lookup table: every site alone on the target, once; a network is the sum of its sites.

A site is timed as a model of its own, cut out of the graph with what the runtime computes in the
same kernel: its constants, the Q/DQ around it and the activation behind it. What a kernel finds in
the caches, and what the runtime fuses or moves between two sites, is lost; that is the price of a
table (FBNet, arXiv 1812.03443, and ProxylessNAS, arXiv 1812.00332, search with such tables).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import onnx_ir as ir

from compress.errors import CompressError, EngineError, LoadError
from compress.estimate.graphs import Network
from compress.estimate.place import Place, place_of
from compress.estimate.store import read_json, write_json
from compress.graph import infer_shapes
from compress.model import Model, TensorSpec
from compress.progress import Progress, silent
from compress.target import Engine, Target

SECONDS = 0.04
"""To time one site."""
_ACTIVATIONS = ("Relu", "Clip", "HardSwish", "LeakyRelu", "Sigmoid", "HardSigmoid")
_CALL = "call"


@dataclass
class Table:
    """Microseconds by site configuration on one place.

    Attributes:
        target: that sites are built for.
        place: of the target.
        times_us: by the hash of a configuration; "call" is what an almost empty model takes.
        measured: how many of them were measured by this object rather than read.
    """

    target: Target
    place: Place
    times_us: dict[str, float] = field(default_factory=dict)
    measured: int = 0

    @classmethod
    def open(cls, target: Target) -> Table:
        """The table of the target's place, with what was measured before."""
        table = cls(target, place_of(target))
        try:
            document = read_json(table.path)
            times = {str(k): float(v) for k, v in document["times_us"].items()}
            if Place.from_dict(document["place"]) == table.place and all(
                0 <= value < 1e12 for value in times.values()
            ):
                table.times_us = times
        except (LoadError, KeyError, TypeError, ValueError, AttributeError):
            pass  # none yet, or damaged: measured again
        return table

    @property
    def path(self) -> Path:
        """Its file."""
        return self.place.folder / "table.json"

    def save(self) -> None:
        """Write what was measured.

        Raises:
            OutputError: the file cannot be written.
        """
        write_json(self.path, {"place": self.place.to_dict(), "times_us": self.times_us})

    def sum(
        self, model: Model, engine: Engine, progress: Progress = silent
    ) -> tuple[float, list[tuple[str, str, float]], list[str]]:
        """Microseconds of a network, of each of its sites, and what could not be timed alone.

        Sites that the runtime computes within another's kernel count nothing.

        Args:
            model: at the ONNX stage.
            engine: built from it, which tells what has a kernel of its own.
            progress: opens a tracker in sites.

        Returns:
            the sum with one call's overhead; name, operator and microseconds of each site; names
            of sites that failed.
        """
        before = self.measured
        own = {kernel.site for kernel in engine.kernels()} - {""}
        nodes = [node for node in model.graph_model.graph if node.name in own]
        shapes = infer_shapes(model.graph_model)
        rows: list[tuple[str, str, float]] = []
        failed: list[str] = []
        inside: set[str] = set()
        with progress("Time sites alone", len(nodes)) as advance:
            for node in nodes:
                if node.name not in inside:
                    try:
                        cut = cut_site(model, node, shapes)
                        rows.append((node.name or "", node.op_type, self._time(cut.model)))
                        inside |= cut.inside
                    except CompressError:
                        failed.append(node.name or "")
                advance(1, node.name or "")
        total = sum(time for _, _, time in rows) + self.call_us()
        if self.measured > before:
            self.save()
        return total, rows, failed

    def call_us(self) -> float:
        """Microseconds of one call of an almost empty model."""
        if _CALL not in self.times_us:
            network = Network((1, 1, 1, 1), self.target.capabilities.opset, "call")
            self.times_us[_CALL] = self._measure(network.model(network.relu(network.start)))
            self.measured += 1
        return self.times_us[_CALL]

    def _time(self, model: Model) -> float:
        key = configuration(model)
        if key not in self.times_us:
            call = self.call_us()
            self.times_us[key] = max(self._measure(model, True) - call, 0.0)
            self.measured += 1
        return self.times_us[key]

    def _measure(self, model: Model, share: bool = False) -> float:
        """Median microseconds of a call; with `share`, without what the edges were moved for."""
        engine = self.target.build(model)
        inputs = model.example()
        spent = _median_us(lambda: engine(inputs), SECONDS)
        if not (share and self.target.capabilities.profiler):
            return spent
        times = engine.profile(inputs, 10)
        total = sum(one.p50_us for one in times)
        moved = sum(one.p50_us for one in times if not one.kernel.site)
        return spent * (1 - moved / total) if total and moved < total else spent


def _median_us(call: Callable[[], object], seconds: float) -> float:
    for _ in range(3):
        call()
    start = last = perf_counter()
    times: list[float] = []
    while last - start < seconds or len(times) < 5:
        call()
        now = perf_counter()
        times.append(now - last)
        last = now
    return float(np.median(times)) * 1e6


@dataclass(frozen=True)
class Cut:
    """One site as a model of its own.

    Attributes:
        model: it.
        inside: names of all operators in it.
    """

    model: Model
    inside: frozenset[str]


def cut_site(model: Model, node: ir.Node, shapes: dict[str, tuple[int, ...]]) -> Cut:
    """The site as a model, with its constants, the Q/DQ around it and its activation.

    Raises:
        EngineError: the shape of an input is unknown.
    """
    last = node
    if node.op_type not in _ACTIVATIONS and (follower := _only_user(last)) is not None:
        last = follower if follower.op_type in _ACTIVATIONS else last
    follower = _only_user(last)
    if node.op_type not in ("QuantizeLinear", "DequantizeLinear") and follower is not None:
        last = follower if follower.op_type == "QuantizeLinear" else last
    wanted: dict[int, ir.Node] = {}
    edges: dict[str, ir.Value] = {}
    _collect(last, node, _constants(model.graph_model.graph), wanted, edges)
    order = [one for one in model.graph_model.graph if id(one) in wanted]
    specs = tuple(_spec(value, shapes) for value in edges.values())
    program = _submodel(model.graph_model, order, list(edges.values()), last.outputs[0], specs)
    names = frozenset(one.name or "" for one in order)
    return Cut(Model(program, specs, f"{model.name}: {node.name}"), names)


def _only_user(node: ir.Node) -> ir.Node | None:
    users = [user for user, _ in node.outputs[0].uses()]
    leaves = node.outputs[0].is_graph_output()
    return users[0] if len(users) == 1 and not leaves else None


def _collect(
    node: ir.Node,
    site: ir.Node,
    constants: frozenset[int],
    wanted: dict[int, ir.Node],
    edges: dict[str, ir.Value],
) -> None:
    """Nodes up to the site, what computes its constants, and the values that enter."""
    wanted[id(node)] = node
    for value in node.inputs:
        if value is None or value.is_initializer():
            continue
        maker = value.producer()
        if maker is not None and (_between(node, site) or id(maker) in constants):
            _collect(maker, site, constants, wanted, edges)
        elif maker is not None and maker.op_type == "DequantizeLinear" and node is site:
            wanted[id(maker)] = maker
            for given in maker.inputs:
                if given is not None and not given.is_initializer():
                    edges[given.name or ""] = given
        else:
            edges[value.name or ""] = value


def _between(node: ir.Node, site: ir.Node) -> bool:
    """Whether the operator stands behind the site: what it reads is still inside."""
    return node is not site and node.op_type in (*_ACTIVATIONS, "QuantizeLinear")


def _constants(graph: ir.Graph) -> frozenset[int]:
    """Identities of the nodes that depend on no input of the graph."""
    found: set[int] = set()
    for node in graph:
        computed = (v for v in node.inputs if v is not None and not v.is_initializer())
        makers = (value.producer() for value in computed)
        if all(maker is not None and id(maker) in found for maker in makers):
            found.add(id(node))
    return frozenset(found)


def _spec(value: ir.Value, shapes: dict[str, tuple[int, ...]]) -> TensorSpec:
    shape = shapes.get(value.name or "", (-1,))
    if any(size < 0 for size in shape):
        raise EngineError(f"The shape of {value.name} is unknown.")
    return TensorSpec(value.name or "", shape, _dtype(value).numpy().name)


def _dtype(value: ir.Value) -> ir.DataType:
    maker = value.producer()
    if maker is not None and maker.op_type == "QuantizeLinear" and len(maker.inputs) > 2:
        zero = maker.inputs[2]
        if zero is not None and zero.const_value is not None:
            return zero.const_value.dtype
    return value.dtype or ir.DataType.FLOAT


def _submodel(
    source: ir.Model,
    nodes: Sequence[ir.Node],
    edges: Sequence[ir.Value],
    out: ir.Value,
    specs: Sequence[TensorSpec],
) -> ir.Model:
    """A model of copies of the nodes."""
    made: dict[int, ir.Value] = {}
    for value, spec in zip(edges, specs, strict=True):
        made[id(value)] = ir.Value(
            name=value.name, shape=ir.Shape(spec.shape), type=ir.TensorType(_dtype(value))
        )
    inputs = [made[id(value)] for value in edges]
    constants: list[ir.Value] = []

    def copy(value: ir.Value | None) -> ir.Value | None:
        if value is None:
            return None
        if id(value) not in made:
            one = ir.Value(name=value.name, shape=value.shape, type=value.type)
            if value.is_initializer():
                one.const_value = value.const_value
                constants.append(one)
            made[id(value)] = one
        return made[id(value)]

    copies = []
    for node in nodes:
        outputs = [copy(value) for value in node.outputs]
        copies.append(
            ir.Node(
                node.domain,
                node.op_type,
                [copy(value) for value in node.inputs],
                list(node.attributes.values()),
                outputs=[value for value in outputs if value is not None],
                name=node.name,
            )
        )
    result = made[id(out)]
    result.type = ir.TensorType(_dtype(out))
    graph = ir.Graph(
        inputs,
        [result],
        nodes=copies,
        initializers=constants,
        opset_imports=dict(source.graph.opset_imports),
        name="site",
    )
    return ir.Model(graph, ir_version=source.ir_version)


def configuration(model: Model) -> str:
    """Hash of what decides a site's time: operators, attributes, shapes and types; not numbers."""
    places: dict[str, int] = {}
    rows: list[Any] = [[spec.shape, spec.dtype] for spec in model.inputs]
    for node in model.graph_model.graph:
        row: list[Any] = [node.op_type, sorted(map(str, node.attributes.values()))]
        for value in node.inputs:
            row.append(list(_facts(value, places)))
        for value in node.outputs:
            places.setdefault(value.name or "", len(places))
        rows.append(row)
    text = json.dumps(rows, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _facts(value: ir.Value | None, places: dict[str, int]) -> Iterator[Any]:
    if value is None:
        yield None
    elif value.const_value is not None:
        tensor = value.const_value
        yield from (list(tensor.shape.numpy()), str(tensor.dtype))
        # Small integers are shapes and axes, and zero points; those decide what is computed.
        if tensor.size <= 8 and tensor.dtype in (ir.DataType.INT64, ir.DataType.INT32):
            yield tensor.numpy().tolist()
    else:
        yield places.setdefault(value.name or "", len(places))
