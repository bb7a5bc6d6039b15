"""The TensorRT engine on a stand-in for TensorRT and CUDA, since neither runs without a GPU.

The stand-in has the names of `targets.tensorrt_api` and no others; behind them ONNX Runtime
computes on the addresses that it is given. So this shows that the calls come in the right order
and with the right values, and nothing about TensorRT itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from compress.errors import EngineError
from compress.loading import load
from compress.model import Model
from targets.tensorrt import TensorRT
from targets.tensorrt_api import NAMES, SOURCES

MODULES = [f"targets.{name.removesuffix('.py')}" for name in SOURCES]
PLAN = b"PLAN"
CAPTURED: list[Any] = []
"""Contexts that enqueued work during a capture."""
KINDS = {"tensor(float)": np.float32, "tensor(int64)": np.int64}


class Enum:
    def __init__(self, name: str) -> None:
        self.name = name

    def __int__(self) -> int:
        return 3


class Builder:
    flags: ClassVar[list[int]] = []

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def create_network(self, flags: int) -> Any:
        Builder.flags.append(flags)
        return types.SimpleNamespace(model=b"")

    def create_builder_config(self) -> Config:
        return Config()

    def create_optimization_profile(self) -> Profile:
        return Profile()

    def build_serialized_network(self, network: Any, config: Config) -> bytes | None:
        if config.pools != {"WORKSPACE": 4096 << 20}:
            self.logger.log(trt.ILogger.Severity.ERROR, "Not enough workspace.")
            self.logger.log(trt.ILogger.Severity.WARNING, "A warning.")
            return None
        Config.last = config
        config.cache = b"timings"
        profile = config.profiles[0].shapes if config.profiles else {}
        return PLAN + json.dumps(profile).encode() + b"\n" + network.model


class Config:
    last: ClassVar[Config]

    def __init__(self) -> None:
        self.pools: dict[str, int] = {}
        self.flags: list[str] = []
        self.profiles: list[Profile] = []
        self.cache = b""
        self.profiling_verbosity = self.hardware_compatibility_level = None

    def set_memory_pool_limit(self, pool: Enum, pool_size: int) -> None:
        self.pools[pool.name] = pool_size

    def set_flag(self, flag: Enum) -> None:
        self.flags.append(flag.name)

    def add_optimization_profile(self, profile: Profile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
        return Timings(serialized_timing_cache)

    def set_timing_cache(self, cache: Timings, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.start = cache.data
        return cache.data in (b"", b"timings")

    def get_timing_cache(self) -> Timings:
        return Timings(self.cache)


class Timings:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> bytes:
        return self.data


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, list[list[int]]] = {}

    def set_shape(self, name: str, low: list[int], usual: list[int], high: list[int]) -> None:
        self.shapes[name] = [low, usual, high]


class OnnxParser:
    def __init__(self, network: Any, logger: Any) -> None:
        self.network, self.errors = network, []

    def parse_from_file(self, model: str) -> bool:
        self.network.model = Path(model).read_bytes()
        known = onnx.load(model).graph.node
        self.errors = [node.op_type for node in known if node.op_type == "Det"]
        return not self.errors

    @property
    def num_errors(self) -> int:
        return len(self.errors)

    def get_error(self, index: int) -> Any:
        return types.SimpleNamespace(desc=lambda: f"There is no {self.errors[index]}.")


class Runtime:
    engine_host_code_allowed = False

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
        if not plan.startswith(PLAN):
            self.logger.log(trt.ILogger.Severity.ERROR, "Magic tag does not match.")
            return None
        profile, _, model = plan.removeprefix(PLAN).partition(b"\n")
        return Engine(json.loads(profile), model)


class Engine:
    def __init__(self, profile: dict[str, list[list[int]]], model: bytes) -> None:
        self.profile = profile
        self.session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        self.given = {one.name: one for one in self.session.get_inputs()}
        self.tensors = {**self.given, **{one.name: one for one in self.session.get_outputs()}}
        self.num_io_tensors = len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> object:
        return trt.TensorIOMode.INPUT if name in self.given else "output"

    def get_tensor_dtype(self, name: str) -> str:
        return str(self.tensors[name].type)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(n if isinstance(n, int) else -1 for n in self.tensors[name].shape)

    def get_tensor_profile_shape(self, name: str, index: int) -> list[list[int]]:
        assert index == 0
        return self.profile[name]

    def create_execution_context(self) -> Context:
        return Context(self)

    def create_engine_inspector(self) -> Any:
        layer = {
            "Name": "conv + relu", "LayerType": "CaskConvolution",
            "Inputs": [{"Format/Datatype": "Row major linear FP32"}],
            "Metadata": "[ONNX Layer: conv]\x1e[ONNX Layer: relu]",
        }  # fmt: skip
        text = json.dumps({"Layers": [layer, "fc"]})
        return types.SimpleNamespace(get_engine_information=lambda kind: text)


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine, self.profiler = engine, None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.runs = 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if name in self.engine.profile:
            low, _, high = self.engine.profile[name]
            inside = all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))
        else:
            inside = shape == self.engine.get_tensor_shape(name)
        self.shapes[name] = shape
        return inside

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self.shapes:
            return self.shapes[name]
        zeros = {one: np.zeros(self.shapes[one], self.kind(one)) for one in self.engine.given}
        return tuple(self.engine.session.run([name], zeros)[0].shape)

    def kind(self, name: str) -> type:
        return KINDS[self.engine.tensors[name].type]

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.addresses[name] = memory
        return memory != 0

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert stream_handle == 7
        if CAPTURED and CAPTURED[-1] is None:
            CAPTURED[-1] = self
            return True
        self.runs += 1
        inputs = {}
        for name in self.engine.given:
            array = np.empty(self.shapes[name], self.kind(name))
            ctypes.memmove(array.ctypes.data, self.addresses[name], array.nbytes)
            inputs[name] = array
        names = [name for name in self.engine.tensors if name not in self.engine.given]
        for name, array in zip(names, self.engine.session.run(names, inputs), strict=True):
            ctypes.memmove(self.addresses[name], array.ctypes.data, array.nbytes)
        if self.profiler is not None:
            self.profiler.report_layer_time("conv + relu", 0.25)
            self.profiler.report_layer_time("fc", 0.5)
        return True


class Stream:
    cuda_stream = 7

    def synchronize(self) -> None:
        """Everything is done already."""


class Event:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: Stream) -> None:
        self.recorded = True

    def synchronize(self) -> None:
        assert self.recorded

    def elapsed_time(self, end: Event) -> float:
        assert self.recorded
        assert end.recorded
        return 1.5


class Graph:
    def replay(self) -> None:
        assert self.context.execute_async_v3(7)


@contextlib.contextmanager
def capture(graph: Graph, stream: Stream) -> Iterator[None]:
    CAPTURED.append(None)
    yield
    graph.context = CAPTURED.pop()


def stand_in(version: str) -> types.ModuleType:
    """A module with the names of the list; enums are made of it."""
    module = types.ModuleType("tensorrt")
    own = {one.__name__: one for one in (Builder, OnnxParser, Runtime)}
    for name in NAMES:
        head, *rest = name.path.split(".")
        if head in own:
            setattr(module, head, own[head])
        elif rest and name.arguments is None and not head.startswith("I"):
            holder = module.__dict__.setdefault(head, types.SimpleNamespace())
            setattr(holder, rest[0], Enum(rest[0]))
    severity = {one: Enum(one) for one in ("ERROR", "INTERNAL_ERROR", "WARNING")}
    module.ILogger = type("ILogger", (), {"Severity": types.SimpleNamespace(**severity)})
    module.IProfiler = type("IProfiler", (), {})
    module.nptype = KINDS.__getitem__
    module.__version__ = version
    return module


trt = stand_in("10.16.1.11")


@pytest.fixture(params=["10.16.1.11", "11.4.0.106"])
def module(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The engine module over the stand-ins."""
    monkeypatch.setattr(trt, "__version__", request.param)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    for name, value in (("Stream", Stream), ("Event", Event), ("CUDAGraph", Graph)):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", capture)
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    loaded = importlib.import_module("targets.tensorrt_engine")
    monkeypatch.setattr(loaded, "_DEVICE", "cpu")
    Builder.flags.clear()
    yield loaded
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def model(tiny_onnx: Path) -> Model:
    return load(tiny_onnx)


def expected(model: Model, x: np.ndarray) -> np.ndarray:
    import onnx_ir as ir

    proto = ir.to_proto(model.graph_model).SerializeToString()
    session = onnxruntime.InferenceSession(proto, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def images(count: int) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((count, 3, 8, 8)).astype(np.float32)


def test_it_builds_runs_and_replays(module: Any, model: Model) -> None:
    engine = TensorRT(max_batch=4).build(model)
    strongly_typed = 0 if trt.__version__.startswith("11") else 1 << 3
    assert Builder.flags == [strongly_typed]
    assert [str(spec) for spec in engine.inputs] == ["x:batchx3x8x8:float32"]
    assert engine.outputs == ("y",)
    for count in (1, 3, 3, 4, 1):
        np.testing.assert_array_equal(
            engine({"x": images(count)})["y"], expected(model, images(count))
        )
    assert engine._graph is not None


def test_a_batch_above_the_profile_runs_in_parts(module: Any, model: Model) -> None:
    engine = TensorRT(max_batch=4).build(model)
    x = images(11)
    np.testing.assert_allclose(engine({"x": x})["y"], expected(model, x), atol=1e-6)


def test_options_reach_the_builder(module: Any, model: Model, tmp_path: Path) -> None:
    target = TensorRT(batch=2, max_batch=8, version_compatible=True)
    target.build_in(model, tmp_path)
    config = Config.last
    assert config.flags == ["VERSION_COMPATIBLE"]
    assert config.profiling_verbosity.name == "DETAILED"
    assert config.hardware_compatibility_level is None
    assert config.profiles[0].shapes == {"x": [[1, 3, 8, 8], [2, 3, 8, 8], [8, 3, 8, 8]]}
    assert (tmp_path / "timing.cache").read_bytes() == b"timings"
    assert config.start == b""
    target.build_in(model, tmp_path)
    assert Config.last.start == b"timings"
    (tmp_path / "timing.cache").write_bytes(b"of another GPU")
    TensorRT(hardware_compatible="ampere_plus").build_in(model, tmp_path)
    assert Config.last.start == b""
    assert Config.last.hardware_compatibility_level.name == "AMPERE_PLUS"
    TensorRT(timing_cache=False).build_in(model, tmp_path / "nowhere")


def test_it_is_saved_and_loaded(module: Any, model: Model, tmp_path: Path) -> None:
    target = TensorRT()
    engine = target.build(model)
    assert [path.name for path in engine.save(tmp_path)] == ["model.engine"]
    x = images(2)
    np.testing.assert_array_equal(target.load(tmp_path)({"x": x})["y"], engine({"x": x})["y"])
    (tmp_path / "model.engine").write_bytes(b"something else")
    with pytest.raises(EngineError, match=r"compress build.*Magic tag does not match"):
        target.load(tmp_path)


def test_times_are_those_of_cuda_events(module: Any, model: Model) -> None:
    engine = TensorRT().build(model)
    run = engine.timed({"x": images(2)})
    before = engine._context.runs
    assert run() == 1.5e-3
    assert engine._context.runs == before + 1


def test_layers_and_their_times(module: Any, model: Model) -> None:
    engine = TensorRT().build(model)
    conv, fc = engine.kernels()
    assert (conv.op_type, conv.precision, conv.site) == ("CaskConvolution", "float32", "conv")
    assert fc.name == "fc"
    times = engine.profile({"x": images(1)}, runs=3)
    assert [(one.kernel.name, one.p50_us) for one in times] == [("conv + relu", 250), ("fc", 500)]


def test_what_tensorrt_says_is_in_the_error(
    module: Any, model: Model, onnx_model: Callable[..., Model]
) -> None:
    det = onnx_model("det (float[2,4,4] x) => (float[2] y) { y = Det (x) }")
    with pytest.raises(EngineError, match=r"does not read .*There is no Det"):
        TensorRT().build(det)
    with pytest.raises(EngineError, match=r"cannot build tiny.*Not enough workspace\.$"):
        TensorRT(workspace_mib=1).build(model)


def test_inputs_that_do_not_fit_are_refused(module: Any, model: Model) -> None:
    engine = TensorRT().build(model)
    with pytest.raises(EngineError, match="x:batchx3x8x8:float32; x is missing"):
        engine({"z": images(1)})
    with pytest.raises(EngineError, match=r"refuses shape \(1, 3, 9, 9\) for x"):
        engine({"x": np.zeros((1, 3, 9, 9), np.float32)})
    np.testing.assert_array_equal(engine({"x": images(1)})["y"], expected(model, images(1)))
