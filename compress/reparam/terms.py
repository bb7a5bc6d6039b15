"""Sums of several tensors, some of which come from the same one: those are added first."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from compress.reparam.branches import parts_behind
from compress.reparam.offers import Market
from compress.reparam.reading import is_affine, is_join
from compress.rewrites import replace_node


@dataclass(frozen=True)
class Term:
    """One summand.

    Attributes:
        negative: whether it is subtracted.
        roots: tensors that it is an affine map of; itself among them.
    """

    value: ir.Value
    negative: bool
    roots: frozenset[ir.Value]


def regroup(
    graph: ir.Graph, sink: ir.Node, market: Market, shapes: dict[str, tuple[int, ...]]
) -> ir.Node | None:
    """Add terms of one root before the others, where that lets them be merged.

    Args:
        graph: is changed only where it pays.
        sink: the last of several additions.
        market: learns the place of what is added.
        shapes: learns the shapes.

    Returns:
        The addition of the terms of one root; None where nothing was changed.
    """
    tree, terms = _terms(sink, market)
    if len(terms) < 3:
        return None
    counted = {
        root: sum(root in term.roots for term in terms) for one in terms for root in one.roots
    }
    common = [root for root, count in counted.items() if 1 < count < len(terms)]
    for root in sorted(common, key=lambda root: (-counted[root], root.name or "")):
        chosen = [term for term in terms if root in term.roots]
        rest = [term for term in terms if root not in term.roots]
        # Something that is not subtracted has to come first.
        if all(term.negative for term in chosen):
            continue
        nodes = _sum(chosen, f"{sink.name}/branches")
        last = nodes[-1]
        _announce(nodes, sink, market, shapes)
        if market.ignoring(tree).offers(last)[0]:
            summed = Term(last.outputs[0], False, frozenset())
            new = _sum(
                [*(t for t in rest if not t.negative), summed, *(t for t in rest if t.negative)],
                f"{sink.name}/sum",
            )
            new[-1].name = sink.name
            _announce(new, sink, market, shapes)
            replace_node(graph, sink, [*nodes, *new])
            shapes[new[-1].outputs[0].name or ""] = shapes[nodes[-1].outputs[0].name or ""]
            for node in sorted(tree - {sink}, key=lambda one: -market.order[one]):
                graph.remove(node, safe=True)
            return last
        for node in reversed(nodes):
            for index in range(len(node.inputs)):
                node.replace_input_with(index, None)
    return None


def _terms(sink: ir.Node, market: Market) -> tuple[frozenset[ir.Node], list[Term]]:
    """The additions that end in `sink`, and what they add."""
    tree, todo, found = {sink}, [(sink, False)], []
    while todo:
        node, negative = todo.pop()
        for index, value in enumerate(node.inputs):
            sign = negative ^ (node.op_type == "Sub" and index == 1)
            if value is None:
                continue
            producer = value.producer()
            own = [use.node for use in value.uses()] == [node] and not value.is_graph_output()
            if producer is not None and own and _adds(producer):
                tree.add(producer)
                todo.append((producer, sign))
            else:
                found.append((value, sign))
    terms = []
    for value, sign in found:
        roots = {value}
        producer = value.producer()
        alone = all(use.node in tree for use in value.uses()) and not value.is_graph_output()
        if producer is not None and alone and is_affine(producer):
            roots |= {part.root for part in parts_behind(producer, market.order, market.ignored)}
        terms.append(Term(value, sign, frozenset(roots)))
    return frozenset(tree), terms


def _adds(node: ir.Node) -> bool:
    return is_affine(node) and node.op_type in ("Add", "Sub", "Sum") and is_join(node)


def _sum(terms: list[Term], name: str) -> list[ir.Node]:
    first = next(term for term in terms if not term.negative)
    total = first.value
    nodes: list[ir.Node] = []
    for term in terms:
        if term is not first:
            operator = "Sub" if term.negative else "Add"
            nodes.append(ir.node(operator, [total, term.value], name=f"{name}.{len(nodes)}"))
            total = nodes[-1].outputs[0]
    return nodes


def _announce(
    nodes: list[ir.Node], sink: ir.Node, market: Market, shapes: dict[str, tuple[int, ...]]
) -> None:
    """Name, type and place what stands in the place of `sink`."""
    out = sink.outputs[0]
    for index, node in enumerate(nodes):
        made = node.outputs[0]
        made.name, made.type, made.shape = f"{node.name}/out", out.type, out.shape
        shapes[made.name] = shapes.get(out.name or "", ())
        market.order[node] = market.order[sink] - 0.5 + index / 1000
