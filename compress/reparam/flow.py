"""Which layer's output each BatchNorm of a model reads, and who else reads it.

With an example the model is run, and every operation on a tensor is seen by torch's dispatcher:
this holds for any control flow, and for code that torch.fx and torch.export cannot capture.
Without one the model is traced by torch.fx, which needs no shapes, but fails where Python code
branches on values.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

Origin: TypeAlias = "nn.Module | str"
"""A watched module, or the name of an operation."""

KEPT = "what the model returns or keeps"
_QUESTIONS = ("size", "dim", "numel", ".shape", ".ndim", ".dtype", ".device")
"""What a traced program may ask of a tensor without reading its values."""


@dataclass
class Flow:
    """Of one run.

    Attributes:
        calls: how often each watched module was called.
        source: what made the input of each BatchNorm.
        users: who reads the output of each layer.
        axes: of the output of each layer; empty where nothing was run.
    """

    calls: Counter[nn.Module] = field(default_factory=Counter)
    source: dict[nn.Module, Origin] = field(default_factory=dict)
    users: dict[nn.Module, set[Origin]] = field(default_factory=dict)
    axes: dict[nn.Module, int] = field(default_factory=dict)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes who reads the outputs of layers; its hooks tell it where the run is."""

    def __init__(self, layers: Collection[nn.Module], norms: Collection[nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layers, self.norms, self.flow = layers, norms, Flow()
        self._makers: Any = WeakTensorKeyDictionary()
        self._outputs: list[tuple[nn.Module, weakref.ref[Tensor]]] = []
        self._inside: list[nn.Module] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = str(func.overloadpacket)
        for tensor in _tensors((args, kwargs)):
            maker = self._makers.get(tensor)
            if isinstance(maker, nn.Module):
                self.flow.users[maker].add(self._inside[-1] if self._inside else name)
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._makers[tensor] = name
        return result

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.flow.calls[module] += 1
        self._inside.append(module)
        if module in self.norms:
            given = next(iter(_tensors((args, kwargs))), None)
            maker = self._makers.get(given, "an input") if given is not None else "an input"
            self.flow.source[module] = maker

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._inside.pop()
        if module in self.layers and isinstance(output, Tensor):
            self._makers[output] = module
            self.flow.users.setdefault(module, set())
            self.flow.axes[module] = output.ndim
            self._outputs.append((module, weakref.ref(output)))

    def finish(self) -> Flow:
        """To be called while the model's outputs are alive."""
        if any(output() is not None for _, output in self._outputs):
            gc.collect()
        for module, output in self._outputs:
            if output() is not None:
                self.flow.users[module].add(KEPT)
        return self.flow


def record(
    model: nn.Module, layers: Collection[nn.Module], norms: Collection[nn.Module], example: Any
) -> tuple[Flow, Any]:
    """What happens in a run with an example, and what the model returns.

    Args:
        model: in the mode and with the flags of interest; its buffers stay as they are.
        layers: modules whose outputs are followed.
        norms: modules whose inputs are followed.
        example: see `call`.
    """
    recorder = _Recorder(layers, norms)
    handles = []
    for module in (*layers, *norms):
        handles.append(module.register_forward_pre_hook(recorder.enter, with_kwargs=True))
        handles.append(module.register_forward_hook(recorder.leave))
    try:
        with recorder:
            outputs = call(model, example)
        return recorder.finish(), outputs
    finally:
        for handle in handles:
            handle.remove()


def call(model: nn.Module, example: Any) -> Any:
    """Run the model without gradients; buffers and the random state are as before afterwards.

    Args:
        model: as it is.
        example: one tensor, a tuple of arguments, or a dict of keyword arguments.
    """
    before = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    places = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=list(places)), torch.no_grad():
            # Not torch.manual_seed, which would also seed devices whose state is not kept.
            torch.default_generator.manual_seed(0)
            for place in places:
                with torch.cuda.device(place):
                    torch.cuda.manual_seed(0)
            if isinstance(example, dict):
                return model(**example)
            return model(*example) if isinstance(example, (tuple, list)) else model(example)
    finally:
        with torch.no_grad():
            for module, name, buffer, values in before:
                setattr(module, name, buffer.copy_(values))


def trace(model: nn.Module, layers: Collection[nn.Module], norms: Collection[nn.Module]) -> Flow:
    """What torch.fx sees; its errors are the caller's."""
    watched = {*layers, *norms}
    flow = Flow()
    graph = _Tracer(watched).trace(model)
    targets = {
        node: model.get_submodule(str(node.target))
        for node in graph.nodes
        if node.op == "call_module"
    }
    for node, module in targets.items():
        if module not in watched:
            continue
        flow.calls[module] += 1
        if module in norms:
            given = next(iter(node.all_input_nodes), None)
            flow.source[module] = _origin(given, targets, watched)
        else:
            users = {_origin(user, targets, watched) for user in node.users}
            flow.users.setdefault(module, set()).update(users - set(_QUESTIONS))
    return flow


class _Tracer(fx.Tracer):
    def __init__(self, leaves: Collection[nn.Module]) -> None:
        super().__init__()
        self._leaves = leaves

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self._leaves or super().is_leaf_module(m, module_qualified_name)


def _origin(
    node: fx.Node | None, targets: dict[fx.Node, nn.Module], watched: Collection[nn.Module]
) -> Origin:
    if node is None or node.op == "placeholder":
        return "an input"
    if node.op == "output":
        return KEPT
    if node.op == "call_module":
        module = targets[node]
        return module if module in watched else str(node.target)
    if node.target is getattr:
        return f".{node.args[1]}"
    return getattr(node.target, "__name__", str(node.target))


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


@contextlib.contextmanager
def flags(model: nn.Module, training: bool) -> Iterator[None]:
    """`train()` or `eval()` for a while; frozen BatchNorm stays frozen."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, flag in before:
            module.training = flag
