"""Which blocks are found, what is left alone and why, and what a mode survives."""

from __future__ import annotations

import copy
import io
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from compress import reparam
from compress.errors import UnsupportedError, UsageError
from compress.export import to_onnx
from compress.loading import load
from compress.passes import Context
from compress.reference import reference_session, run
from compress.reparam import Pair
from compress.reparam.layers import Frozen, Swapped
from compress.rewrites import FoldBatchNorm
from compress.testing import NullTarget, tiny_convnet, tiny_exported, tiny_model

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TINY_PAIRS = (Pair("0", "1"), Pair("4.depthwise", "4.bn1"), Pair("4.pointwise", "4.bn2"))


class Net(nn.Module):
    """Two layers a, b with a BatchNorm each, and a forward that a test gives."""

    def __init__(self, forward: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.a_norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.b, self.b_norm = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.kept: Any = None
        self._forward = forward
        for norm in (self.a_norm, self.b_norm):
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.normal_(norm.running_mean)

    def forward(self, x: Tensor) -> Any:
        return self._forward(self, x)


def plain(net: Any, x: Tensor) -> Tensor:
    y: Tensor = net.b_norm(net.b(torch.relu(net.a_norm(net.a(x)))))
    return y


def both_found(net: nn.Module, example: Any = IMAGES) -> None:
    report = reparam.set_mode(net, "tune", example)
    assert report.pairs == (Pair("a", "a_norm"), Pair("b", "b_norm"))
    assert not report.left


@pytest.mark.parametrize("example", [None, IMAGES, (IMAGES,)], ids=["fx", "tensor", "tuple"])
def test_blocks_are_found_by_where_tensors_go(example: Any) -> None:
    net = tiny_convnet()
    expected = net(IMAGES)
    report = reparam.set_mode(net, "tune", example)
    assert report == reparam.ModeReport("tune", TINY_PAIRS, {})
    torch.testing.assert_close(net(IMAGES), expected)


def test_names_and_order_of_definition_do_not_matter() -> None:
    def crossed(net: Any, x: Tensor) -> Tensor:
        y: Tensor = net.a_norm(net.b(torch.relu(net.b_norm(net.a(x)))))
        return y

    report = reparam.set_mode(Net(crossed), "tune", IMAGES)
    assert set(report.pairs) == {Pair("a", "b_norm"), Pair("b", "a_norm")}


def test_control_flow_on_values_needs_an_example() -> None:
    def branching(net: Any, x: Tensor) -> Tensor:
        return plain(net, x if x.mean() > -100 else -x)

    with pytest.raises(UsageError, match=r"cannot be traced by torch\.fx.*Give example_inputs"):
        reparam.set_mode(Net(branching), "tune")
    both_found(Net(branching))
    both_found(Net(branching), {"x": IMAGES})


def test_an_example_that_does_not_fit_is_named() -> None:
    net = Net(plain)
    with pytest.raises(UsageError, match="cannot run with the example"):
        reparam.set_mode(net, "tune", torch.randn(2, 5, 8, 8))
    assert not any(isinstance(module, Swapped) for module in net.modules())


def test_shapes_are_no_users() -> None:
    def asks(net: Any, x: Tensor) -> Tensor:
        y = net.a(x)
        y = net.a_norm(y).reshape(y.shape[0], y.size(1), y.size(2), -1)
        z: Tensor = net.b_norm(net.b(y))
        return z

    both_found(Net(asks))
    both_found(Net(asks), None)


@dataclass(frozen=True)
class Left:
    """A network whose block a is left alone."""

    name: str
    reason: str
    forward: Callable[[Any, Tensor], Any] = plain
    change: Callable[[Any], object] = lambda net: None
    traced: bool = True


def _second_user(net: Any, x: Tensor) -> Tensor:
    y = net.a(x)
    z: Tensor = net.b_norm(net.b(net.a_norm(y))) + y
    return z


def _view(net: Any, x: Tensor) -> Tensor:
    z: Tensor = net.b_norm(net.b(net.a_norm(net.a(x).flatten(2).unflatten(2, x.shape[2:]))))
    return z


def _returned(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = net.a(x)
    return net.b_norm(net.b(net.a_norm(y))), y


def _stored(net: Any, x: Tensor) -> Tensor:
    net.kept = net.a(x)
    z: Tensor = net.b_norm(net.b(net.a_norm(net.kept)))
    return z


def _activation(net: Any, x: Tensor) -> Tensor:
    z: Tensor = net.b_norm(net.b(net.a_norm(torch.relu(net.a(x)))))
    return z


def _in_place(net: Any, x: Tensor) -> Tensor:
    z: Tensor = net.b_norm(net.b(net.a_norm(torch.relu_(net.a(x)))))
    return z


def _twice(net: Any, x: Tensor) -> Tensor:
    z: Tensor = net.b_norm(net.b(net.a_norm(net.a(net.a(x)))))
    return z


def _norm_twice(net: Any, x: Tensor) -> Tensor:
    z: Tensor = net.b_norm(net.b(net.a_norm(net.a(net.a_norm(x)))))
    return z


def _unused(net: Any, x: Tensor) -> Tensor:
    z: Tensor = net.b_norm(net.b(net.a(x)))
    return z


def _functional(net: Any, x: Tensor) -> Tensor:
    z: Tensor = net.b_norm(net.b(net.a_norm(F.conv2d(x, net.a.weight, padding=1))))
    return z


def _training_only(net: Any, x: Tensor) -> Tensor:
    y = net.a(x)
    z: Tensor = net.b_norm(net.b(net.a_norm(y)))
    return z + y if net.training else z


def _own_forward(net: Any) -> None:
    class Own(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).neg()

    net.a = Own(3, 3, 3, padding=1)


CASES = [
    Left("second user", "a is also read by (aten.)?add", _second_user),
    Left("view", "follows (aten.)?(_unsafe_)?(un)?(flatten|view)", _view),
    Left("returned", "also read by what the model returns or keeps", _returned),
    Left("stored", "also read by what the model returns or keeps", _stored, traced=False),
    Left("activation", "follows (aten.)?relu", _activation),
    Left("in place", "follows (aten.)?relu_", _in_place),
    Left("layer twice", "a is called 2 times", _twice),
    Left("norm twice", "is called 2 times", _norm_twice),
    Left("unused", "was not reached", _unused),
    Left("functional", "follows (aten.)?conv", _functional),
    Left("in training", "a is also read by (aten.)?add", _training_only),
    Left("no statistics", "has no running statistics", change=lambda net: setattr(
        net, "a_norm", nn.BatchNorm2d(3, track_running_stats=False))),
    Left("no gamma", "has no gamma and beta", change=lambda net: setattr(
        net, "a_norm", nn.BatchNorm2d(3, affine=False))),
    Left("tied", "shares its parameters", change=lambda net: setattr(
        net.b, "weight", net.a.weight)),
    Left("hook on layer", "a has hooks", change=lambda net: net.a.register_forward_hook(
        lambda module, args, output: None)),
    Left("hook on norm", "has hooks", change=lambda net: net.a_norm.register_full_backward_hook(
        lambda module, before, after: None)),
    Left("pruned", "a has hooks", change=lambda net: prune.l1_unstructured(
        net.a, "weight", 0.5)),
    Left("parametrized", "a has parametrizations", change=lambda net: (
        parametrizations.weight_norm(net.a))),
    Left("own forward", "a is a Own with a forward of its own", change=_own_forward),
]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "example"),
    [(case, IMAGES) for case in CASES] + [(case, None) for case in CASES if case.traced],
    ids=lambda one: one.name if isinstance(one, Left) else "fx" if one is None else "example",
)
def test_what_is_left_alone_is_named_with_the_reason(case: Left, example: Tensor | None) -> None:
    torch.manual_seed(0)
    net = Net(case.forward)
    case.change(net)
    reparam.set_mode(net, "eval")
    expected = net.eval()(IMAGES)
    report = reparam.set_mode(net, "tune", example)
    assert "a_norm" in report.left
    assert re.search(case.reason, report.left["a_norm"]), report.left["a_norm"]
    assert type(net.a).__name__[:5] != "Tuned"
    assert isinstance(net.a_norm, Frozen)
    torch.testing.assert_close(net(IMAGES), expected)


def test_deploy_leaves_the_same_alone() -> None:
    net = Net(_second_user).eval()
    expected = net(IMAGES)
    report = reparam.set_mode(net, "deploy", IMAGES)
    assert report.pairs == (Pair("b", "b_norm"),)
    assert set(report.left) == {"a_norm"}
    torch.testing.assert_close(net(IMAGES), expected)


def test_a_linear_layer_over_tokens_has_its_channels_elsewhere() -> None:
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
    report = reparam.set_mode(net, "tune", torch.randn(2, 4, 5))
    assert report.left == {"1": "its layer 0 has its channels on another axis"}
    # Without an example nothing tells; the run does.
    assert reparam.set_mode(net, "tune").pairs
    with pytest.raises(UsageError, match="must have 2 axes"):
        net(torch.randn(2, 4, 5))


def test_the_example_run_changes_nothing() -> None:
    net = tiny_convnet().train()
    net.append(nn.Dropout(0.5))
    before = copy.deepcopy(net.state_dict())
    state = torch.get_rng_state()
    reparam.set_mode(net, "tune", IMAGES)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.training
    assert net[3].training


def test_tune_survives_train_and_eval() -> None:
    net = tiny_convnet()
    expected = net(IMAGES)
    reparam.set_mode(net, "tune", IMAGES)
    before = copy.deepcopy(net.state_dict())
    net.train()
    assert net[3].training
    assert not net[1].training
    net[3].p = 0.0
    torch.testing.assert_close(net(IMAGES), expected)
    net.eval()
    torch.testing.assert_close(net(IMAGES), expected)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    with pytest.raises(UsageError, match="cannot be reset"):
        torch.optim.swa_utils.update_bn([IMAGES], net)


def test_hooks_around_blocks_see_what_they_saw() -> None:
    seen = []
    net = tiny_convnet()
    for module in (net, net[4], net[2]):
        module.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    net(IMAGES)
    assert reparam.set_mode(net, "tune", IMAGES).pairs == TINY_PAIRS
    before, _ = seen[:3], seen.clear()
    net(IMAGES)
    for mine, other in zip(seen, before, strict=True):
        torch.testing.assert_close(mine, other)


def test_eval_freezes_batchnorm_until_train() -> None:
    net = tiny_convnet()
    assert reparam.set_mode(net, "eval") == reparam.ModeReport("eval")
    net.train()
    assert not net[1].training
    reparam.set_mode(net, "train")
    assert net[1].training
    assert type(net[1]) is nn.BatchNorm2d
    before = net[1].running_mean.clone()
    net(IMAGES)
    assert not torch.equal(net[1].running_mean, before)


def test_train_keeps_inference_of_a_model_in_inference() -> None:
    net = tiny_convnet().eval()
    reparam.set_mode(net, "tune", IMAGES)
    reparam.set_mode(net, "train")
    assert not net[1].training


def test_the_state_dict_stays_loadable() -> None:
    net, other = tiny_convnet(0), tiny_convnet(1)
    keys = list(net.state_dict())
    parameters = [id(p) for p in net.parameters()]
    for mode in ("eval", "tune", "train"):
        reparam.set_mode(net, mode, IMAGES)  # type: ignore[arg-type]
        assert list(net.state_dict()) == keys
        assert [id(p) for p in net.parameters()] == parameters
    reparam.set_mode(net, "tune", IMAGES)
    net.load_state_dict(other.state_dict())
    torch.testing.assert_close(net(IMAGES), other(IMAGES))


def test_the_context_manager_restores_what_was() -> None:
    net = tiny_convnet().train()
    net[1].eval()  # frozen by hand, as fine-tuning scripts do
    with reparam.tune(net, IMAGES) as report:
        assert report.pairs == TINY_PAIRS
        assert isinstance(net[0], Swapped)
    assert not any(isinstance(module, Swapped) for module in net.modules())
    assert not net[1].training
    assert net[4].bn1.training
    reparam.set_mode(net, "eval")
    with pytest.raises(RuntimeError, match="stopped"), reparam.tune(net, IMAGES):
        raise RuntimeError("stopped")
    assert type(net[0]) is nn.Conv2d
    assert isinstance(net[1], Frozen)
    with reparam.tune(net, IMAGES), reparam.tune(net):
        pass
    assert type(net[0]) is nn.Conv2d


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies_keep_the_mode_and_are_independent(how: str) -> None:
    net = tiny_convnet()
    reparam.set_mode(net, "tune", IMAGES)
    if how == "deepcopy":
        other: Any = copy.deepcopy(net)
    else:
        net[4] = nn.Identity()  # a class of a function cannot be pickled, in any mode
        if how == "pickle":
            other = pickle.loads(pickle.dumps(net))
        else:
            file = io.BytesIO()
            torch.save(net, file)
            file.seek(0)
            other = torch.load(file, weights_only=False)
    expected = net(IMAGES)
    torch.testing.assert_close(other(IMAGES), expected, rtol=0, atol=0)
    assert other[0].__dict__["_folded_norm"] is other[1]
    with torch.no_grad():
        other[1].weight.mul_(2)
    assert not torch.equal(other(IMAGES), expected)
    assert torch.equal(net(IMAGES), expected)
    reparam.set_mode(other, "train")
    assert type(other[0]) is nn.Conv2d


def test_one_module_under_two_names_is_deployed_under_both() -> None:
    norm = nn.BatchNorm2d(3)
    nn.init.constant_(norm.running_mean, 2.0)
    net = nn.Sequential(nn.Conv2d(3, 3, 1), norm)
    net.__dict__["_modules"] = {"first": norm, **net._modules}
    whole = nn.ModuleDict({"norm": norm, "net": nn.Sequential(net._modules["0"], norm)})

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = whole

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.parts["net"](x)
            return y

    model = Whole().eval()
    expected = model(IMAGES)
    assert reparam.set_mode(model, "deploy", IMAGES).pairs
    torch.testing.assert_close(model(IMAGES), expected)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def test_deploy_is_for_good() -> None:
    net = tiny_convnet()
    expected = net(IMAGES)
    report = reparam.set_mode(net, "deploy", IMAGES)
    assert report.pairs == TINY_PAIRS
    torch.testing.assert_close(net(IMAGES), expected)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    for mode in ("train", "eval", "tune"):
        with pytest.raises(UsageError, match=f"cannot go to mode {mode}.*copy.deepcopy"):
            reparam.set_mode(net, mode, IMAGES)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="cannot go to mode tune"), reparam.tune(net, IMAGES):
        pass
    assert reparam.set_mode(net, "deploy", IMAGES).pairs == ()


def test_deploy_from_tune() -> None:
    net = tiny_convnet()
    expected = net(IMAGES)
    reparam.set_mode(net, "tune", IMAGES)
    reparam.set_mode(net, "deploy", IMAGES)
    torch.testing.assert_close(net(IMAGES), expected)
    assert type(net[0]) is nn.Conv2d


def test_unknown_modes_are_refused() -> None:
    with pytest.raises(UsageError, match="'finetune' is unknown; there are train, eval, tune"):
        reparam.set_mode(tiny_convnet(), "finetune")  # type: ignore[arg-type]


def test_another_path_than_the_examples_is_refused() -> None:
    def branching(net: Any, x: Tensor) -> Tensor:
        y = torch.relu(net.a_norm(net.a(x)))
        if x.mean() > 100:
            return net.b_norm(y)  # type: ignore[no-any-return]
        return net.b_norm(net.b(y))  # type: ignore[no-any-return]

    net = Net(branching)
    both_found(net)
    with pytest.raises(UsageError, match="takes another path"):
        net(IMAGES + 1000)


def test_a_hook_that_comes_later_is_refused() -> None:
    net = Net(plain)
    both_found(net)
    net.a.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(UsageError, match="a hook stands between"):
        net(IMAGES)


def test_a_model_that_differs_from_itself_is_refused_and_restored() -> None:
    calls = []

    def unsteady(net: Any, x: Tensor) -> Tensor:
        calls.append(0)
        return plain(net, x) * len(calls)

    net = Net(unsteady)
    with pytest.raises(UnsupportedError, match="differs from itself"):
        reparam.set_mode(net, "tune", IMAGES)
    assert not any(isinstance(module, Swapped) for module in net.modules())


def test_parametrized_batchnorm_is_left_alone() -> None:
    class Positive(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.abs()

    net = Net(plain)
    parametrize.register_parametrization(net.a_norm, "weight", Positive())
    report = reparam.set_mode(net, "tune", IMAGES)
    assert report.left == {"a_norm": "has parametrizations"}


def test_the_exported_graph_is_that_of_eval_mode() -> None:
    net = tiny_convnet()
    reparam.set_mode(net, "tune", IMAGES)
    expected = tiny_exported(21)
    got = to_onnx(load(net, inputs=["1x3x16x16"]), 21)
    nodes = [[(n.op_type, n.name) for n in m.graph_model.graph] for m in (got, expected)]
    assert nodes[0] == nodes[1]
    assert any(op == "BatchNormalization" for op, _ in nodes[0])
    constants = [m.graph_model.graph.initializers for m in (got, expected)]
    assert list(constants[0]) == list(constants[1])
    for name, value in constants[0].items():
        mine, other = value.const_value, constants[1][name].const_value
        assert mine is not None
        assert other is not None
        np.testing.assert_array_equal(mine.numpy(), other.numpy())
    results = [
        run(reference_session(model.graph_model), {spec.name: IMAGES.numpy()})
        for model in (got, expected)
        for spec in model.inputs
    ]
    for mine, other in zip(*(found.values() for found in results), strict=True):
        np.testing.assert_array_equal(mine, other)


def test_deployed_weights_are_those_of_the_onnx_pass() -> None:
    net = tiny_convnet()
    reparam.set_mode(net, "deploy")
    folded = FoldBatchNorm().apply(
        tiny_exported(21), Context(target=NullTarget(), original=tiny_model())
    )
    assert folded.history[-1].details["folded"] == 3
    constants = folded.graph_model.graph.initializers
    names = ("0.weight", "0.bias", "4.pointwise.weight", "4.pointwise.bias", "4.depthwise.weight")
    for name in names:
        value = constants[name].const_value
        assert value is not None
        deployed = net.state_dict()[name].numpy()
        np.testing.assert_allclose(deployed, value.numpy(), rtol=1e-6, atol=1e-7)


def test_training_steps_are_those_of_eval() -> None:
    labels = torch.tensor([1, 3])
    losses: dict[str, list[float]] = {}
    for mode in ("eval", "tune"):
        net = tiny_convnet().double().train()
        net[3].p = 0.0
        reparam.set_mode(net, mode, IMAGES.double())  # type: ignore[arg-type]
        optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, weight_decay=1e-2)
        losses[mode] = []
        for _ in range(10):
            loss = F.cross_entropy(net(IMAGES.double()), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[mode].append(loss.item())
    np.testing.assert_allclose(losses["tune"], losses["eval"], rtol=1e-9)
    assert losses["eval"][-1] < 0.5 * losses["eval"][0]


def test_the_package_is_imported_without_torch() -> None:
    code = "import sys; import compress.reparam; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_is_there() -> None:
    assert set(reparam.__all__) <= set(dir(reparam))
    assert all(getattr(reparam, name).__doc__ for name in reparam.__all__)
    with pytest.raises(AttributeError, match="no attribute 'retune'"):
        reparam.retune  # noqa: B018
