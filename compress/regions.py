"""Where a network can be cut: regions that get one precision each.

The nodes are put in one order, in which a squeeze-and-excite branch comes directly before the
product that it ends in. Regions are pieces of that order, so each reads earlier ones only.
"""

from __future__ import annotations

import itertools
import math
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from compress.graph import graph_sites, infer_shapes, weight_input
from compress.graph_liveness import inputs_of

MANY_REGIONS = 40
"""Where there are more, cuts are given up, those that are worth least first."""
LARGE_PIECE = 8
"""Multiply-accumulate sites; a piece with more is divided although several tensors are alive."""
WORTH_A_CUT = 16
"""MACs on the smaller side of a cut for each element that crosses it. A depthwise 3x3 layer
has 9 for each element of its output: it does about as much work as a conversion would."""
GATE_SHARE = 16
"""A tensor with at most one element for so many of the trunk's may belong to its gate."""


@dataclass(frozen=True)
class Region:
    """A piece of the graph that runs in one precision.

    Attributes:
        name: the module that holds its multiply-accumulates and no others; the first and last
            of them where there is none. No two regions have the same.
        sites: names of its nodes, in order of execution.
        inputs: indices of the regions that it reads, ascending; all are earlier ones.
        border_elements: for each of `inputs`, the elements (batch 1) of the distinct
            floating-point activations that it reads from there.
        macs: multiply-accumulates for one run at batch 1.
    """

    name: str
    sites: tuple[str, ...]
    inputs: tuple[int, ...]
    border_elements: Mapping[int, int] = field(hash=False)
    macs: int


def cut_regions(graph_model: ir.Model) -> tuple[Region, ...]:
    """Cut a graph where few activations cross: behind blocks, and around squeeze-and-excite.

    Every node except constants is in exactly one region, and every region has a
    multiply-accumulate if the graph has one. The model itself is not changed.
    """
    line = _line(graph_model)
    if not line.nodes:
        return ()
    starts = [0, *(cut + 1 for cut in _cuts(line)), len(line.nodes)]
    pieces = [range(start, stop) for start, stop in itertools.pairwise(starts)]
    home = {position: index for index, piece in enumerate(pieces) for position in piece}
    borders: list[Counter[int]] = [Counter() for _ in pieces]
    for value, readers in line.readers.items():
        source = home.get(line.produced[value])
        if source is not None:
            for reader in {home[position] for position in readers} - {source}:
                borders[reader][source] += line.elements[value]
    return tuple(
        Region(
            name=name,
            sites=tuple(node.name or "" for node in line.nodes[piece.start : piece.stop]),
            inputs=tuple(sorted(border)),
            border_elements=dict(sorted(border.items())),
            macs=sum(line.macs[piece.start : piece.stop]),
        )
        for name, border, piece in zip(_names(line, pieces), borders, pieces, strict=True)
    )


@dataclass(frozen=True)
class _Line:
    """The graph as a sequence; a position counts nodes, and -1 is before the first.

    Attributes:
        nodes: all but constants, in an order in which they can run.
        macs: of each node; 0 also where a shape is unknown.
        counted: positions of the multiply-accumulates.
        gates: the pieces that are squeeze-and-excite branches.
        elements: size of every floating-point activation.
        produced: position of the producer of every tensor.
        readers: for every floating-point activation, positions of its readers, ascending.
    """

    nodes: list[ir.Node]
    macs: list[int]
    counted: list[int]
    gates: list[range]
    elements: dict[ir.Value, int]
    produced: dict[ir.Value, int]
    readers: dict[ir.Value, list[int]]


def _line(graph_model: ir.Model) -> _Line:
    graph = graph_model.graph
    nodes = [node for node in graph if node.op_type != "Constant"]
    carriers, activations = _activations(graph, nodes)
    shapes = infer_shapes(graph_model)
    # A size that stays unknown is -1 and counts as one.
    known = {value: tuple(map(abs, shapes.get(value.name or "", ()))) for value in activations}
    macs = {
        node: site.macs if node in carriers else 0
        for node, site in zip(nodes, graph_sites(graph_model), strict=True)
    }
    counted = {node for node in carriers if _multiplies(node, macs[node], known)}
    order, branches = _gates_last(nodes, _branches(nodes, known, counted))
    place = {node: position for position, node in enumerate(order)}
    elements = {
        value: math.prod(shape)
        for value, shape in known.items()
        if value.dtype is None or value.dtype.is_floating_point()
    }
    readers: dict[ir.Value, list[int]] = {value: [] for value in elements}
    for node in order:
        for value in set(inputs_of(node)) & readers.keys() if node in carriers else ():
            readers[value].append(place[node])
    positions = [position for position, node in enumerate(order) if node in counted]
    return _Line(
        nodes=order,
        macs=[macs[node] for node in order],
        counted=positions,
        gates=_separate(branches, positions),
        elements=elements,
        produced=dict.fromkeys(graph.inputs, -1)
        | {out: place[node] for node in order for out in node.outputs},
        readers=readers,
    )


def _multiplies(node: ir.Node, macs: int, shapes: Mapping[ir.Value, tuple[int, ...]]) -> bool:
    """Whether a node sums products; a BatchNorm in the form of a convolution only scales."""
    return macs > math.prod(shapes[node.outputs[0]]) if macs else weight_input(node) is not None


def _activations(
    graph: ir.Graph, nodes: Sequence[ir.Node]
) -> tuple[set[ir.Node], dict[ir.Value, None]]:
    """The nodes that work on data, and the tensors with data; both leave out arithmetic on shapes.

    Only a tensor's shape, not its data, goes through Shape and Size.
    """
    carriers: set[ir.Node] = set()
    activations = {value: None for value in graph.inputs if value.const_value is None}
    for node in nodes:
        if node.op_type not in ("Shape", "Size") and any(v in activations for v in inputs_of(node)):
            carriers.add(node)
            activations |= dict.fromkeys(node.outputs)
    return carriers, activations


def _branches(
    nodes: Sequence[ir.Node], shapes: Mapping[ir.Value, tuple[int, ...]], counted: set[ir.Node]
) -> dict[ir.Node, set[ir.Node]]:
    """Squeeze-and-excite branches by the product that each ends in (Hu et al. 2018, section 3)."""
    found: dict[ir.Node, set[ir.Node]] = {}
    taken: set[ir.Node] = set()
    # Backwards, so that a branch comes before what may be inside it.
    for node in reversed(nodes):
        if node.op_type == "Mul" and node not in taken:
            branch = _branch(node, shapes)
            if branch & counted and not branch & taken:
                found[node] = branch
                taken |= branch
    return found


def _branch(product: ir.Node, shapes: Mapping[ir.Value, tuple[int, ...]]) -> set[ir.Node]:
    """The nodes that compute the small factor and nothing else; empty if there are none."""
    factors = [value for value in product.inputs if value is not None and value in shapes]
    if len(set(factors)) != 2:
        return set()
    gate, trunk = sorted(factors, key=lambda value: math.prod(shapes[value]))
    largest = math.prod(shapes[trunk])

    def small(value: ir.Value) -> bool:
        flat = math.prod(shapes[value][2:]) == 1
        return math.prod(shapes[value]) * (1 if flat else GATE_SHARE) < largest

    branch: set[ir.Node] = set()
    waiting = [gate]
    while waiting:
        node = waiting.pop().producer()
        if node is not None and node not in branch and all(map(small, node.outputs)):
            branch.add(node)
            waiting += [value for value in inputs_of(node) if value in shapes]
    outputs = [value for node in branch for value in node.outputs]
    private = all(
        not value.is_graph_output() and {user for user, _ in value.uses()} <= branch | {product}
        for value in outputs
    )
    return branch if private else set()


def _gates_last(
    nodes: Sequence[ir.Node], branches: Mapping[ir.Node, set[ir.Node]]
) -> tuple[list[ir.Node], list[range]]:
    """The nodes with each branch moved to directly before its product; where the branches are."""
    later = {node: product for product, branch in branches.items() for node in branch}
    moved: dict[ir.Node, list[ir.Node]] = {product: [] for product in branches}
    order: list[ir.Node] = []
    places: list[range] = []
    for node in nodes:
        if node in later:
            moved[later[node]].append(node)
            continue
        if node in moved:
            places.append(range(len(order), len(order) + len(moved[node])))
            order += moved[node]
        order.append(node)
    return order, places


def _separate(branches: Sequence[range], counted: Sequence[int]) -> list[range]:
    """The branches with a multiply-accumulate of the trunk before, between and behind them."""
    gates: list[range] = []
    for branch in branches:
        start = gates[-1].stop if gates else 0
        if any(start <= position < branch.start for position in counted):
            gates.append(branch)
    while gates and counted[-1] < gates[-1].stop:
        gates.pop()
    return gates


def _cuts(line: _Line) -> list[int]:
    """Positions of the nodes that a region ends with, the last left out."""
    alive, passing = _alive(line, len(line.counted)), _alive(line, LARGE_PIECE)
    fixed = [end - 1 for gate in line.gates for end in (gate.start, gate.stop)]
    possible: list[int] = []
    starts = [0, *(gate.stop for gate in line.gates)]
    stops = [*(gate.start for gate in line.gates), len(line.nodes)]
    for start, stop in zip(starts, stops, strict=True):
        inside = [position for position in line.counted if start <= position < stop]
        # One place between any two neighbours: what is left of equals is the last.
        places = [
            min(reversed(range(first, second)), key=alive.__getitem__)
            for first, second in itertools.pairwise(inside)
        ]
        piece: list[int] = []
        for place in places:
            if alive[place][0] <= 1:
                possible += [*_divide(piece, passing), place]
                piece = []
            else:
                piece.append(place)
        possible += _divide(piece, passing)
    return _worthwhile(line, alive, possible, fixed)


def _alive(line: _Line, longest: int) -> list[tuple[int, int]]:
    """Number and elements of the activations that are needed behind each node.

    A finished output of the graph is not: whatever follows does not depend on its precision.
    Those that are needed for more than `longest` multiply-accumulates are left out.
    """
    count = [0] * (len(line.nodes) + 1)
    elements = [0] * (len(line.nodes) + 1)
    for value, readers in line.readers.items():
        first, last = max(line.produced[value], 0), readers[-1] if readers else 0
        if bisect_right(line.counted, last) - bisect_right(line.counted, first) <= longest:
            count[first] += 1
            count[max(first, last)] -= 1
            elements[first] += line.elements[value]
            elements[max(first, last)] -= line.elements[value]
    sums = zip(itertools.accumulate(count), itertools.accumulate(elements), strict=True)
    return list(sums)[:-1]


def _divide(places: Sequence[int], alive: Sequence[tuple[int, int]]) -> list[int]:
    """Places to cut a piece without natural cuts, so that no part is large.

    The narrowest place in the middle third is taken, and each side divided again. Tensors
    that any cut would cross should not count: else a dense block loses one layer at a time.
    """
    if len(places) < LARGE_PIECE:
        return []
    third = len(places) // 3
    best = min(
        range(third, len(places) - third),
        key=lambda index: (alive[places[index]], abs(2 * index + 1 - len(places))),
    )
    before, behind = places[:best], places[best + 1 :]
    return [*_divide(before, alive), places[best], *_divide(behind, alive)]


def _worthwhile(
    line: _Line, alive: Sequence[tuple[int, int]], possible: Sequence[int], fixed: Sequence[int]
) -> list[int]:
    """The fixed cuts, and the possible ones with enough work beside them to pay a conversion."""
    totals = list(itertools.accumulate(line.macs, initial=0))
    optional = set(possible)
    cuts = sorted(optional | set(fixed))
    while True:
        ends = [-1, *cuts, len(line.nodes) - 1]
        work = [totals[stop + 1] - totals[start + 1] for start, stop in itertools.pairwise(ends)]
        # Of equals, the cut beside the least work goes, so that no region swallows the others.
        worth = {
            cut: (min(left, right) / max(alive[cut][1], 1), left + right)
            for cut, (left, right) in zip(cuts, itertools.pairwise(work), strict=True)
            if cut in optional
        }
        least = min(worth, key=worth.__getitem__, default=None)
        if least is None or (worth[least][0] >= WORTH_A_CUT and len(cuts) < MANY_REGIONS):
            return cuts
        cuts.remove(least)


def _names(line: _Line, pieces: Sequence[range]) -> list[str]:
    """For each piece the module with its multiply-accumulates and no others, or first..last."""
    counted = line.counted or range(len(line.nodes))
    regions = [[line.nodes[position] for position in counted if position in p] for p in pieces]
    paths = [[_path(node) for node in region] for region in regions]
    inside = Counter(
        tuple(path[:depth]) for path in itertools.chain(*paths) for depth in range(len(path) + 1)
    )
    names: list[str] = []
    used: Counter[str] = Counter()
    for region, path in zip(regions, paths, strict=True):
        same = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*path, strict=False))
        common = tuple(parts[0] for parts in same)
        name = "".join(common).strip("./")
        if not name or inside[common] > len(region):
            name = "..".join(dict.fromkeys(node.name or "" for node in (region[0], region[-1])))
        # Only where nodes have the same name, or none, two regions could.
        names.append(f"{name}#{used[name]}" if used[name] else name)
        used[name] += 1
    return names


def _path(node: ir.Node) -> list[str]:
    """The parts of the module path that starts a node's name, with their separators."""
    name = re.sub(rf"/{node.op_type}([._]\d+)?$", "", node.name or "")
    return re.findall(r"[./]*[^./]+", name)
