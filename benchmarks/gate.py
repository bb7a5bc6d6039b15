"""How often the gate raises a false alarm, and how often it finds a planted slow-down.

    python -m benchmarks.gate                        # everything, about 35 minutes
    python -m benchmarks.gate --tries 0.02 --name gate_try    # 2 % of the tries

Each try is one `compress check` at its default setting, latency alone, against the same file. Ten
tries share a process; the next ten get a new one. Planted slow-downs:

busy    the candidate's call waits, awake, for exactly that share of the time that it just took
layers  another graph: the same network with layers before it, whose cost a long measurement finds

The network is ResNet-8 (MLPerf Tiny) where the shared folder has it, else a random one of its size.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from scipy.stats import beta

from benchmarks.common import HERE, SHARED, Results, shared_module
from compress.model import Arrays
from compress.regression.budgets import Budget
from compress.regression.checking import SECONDS, check_sides
from compress.regression.limits import MAX_SLOWDOWN
from compress.regression.sequential import ALPHA
from compress.regression.subject import fresh_sides, open_subject
from compress.regression.timing import (
    BASELINE,
    BLOCK_SECONDS,
    CANDIDATE,
    PAIR_SECONDS,
    ROUNDS,
    Pairs,
)
from compress.sessions import each_session
from compress.target import Engine

TRIES_PER_PROCESS = 10
TRUTH_SECONDS = 60.0
WANTED_COST = 0.05
LAYERS = ("1x1", "1x1 1x1", "3x3", "1x1 3x3", "3x3 3x3", "3x3 3x3 3x3")
"""Convolutions from 3 to 3 channels before the network; the one nearest to 5 % is taken."""


@dataclasses.dataclass(frozen=True)
class Scenario:
    """Tries of one kind.

    Attributes:
        tries: at the full setting.
        slowdown: planted by a busy wait, as a share.
        layers: planted by layers instead.
        threads: of both sides.
    """

    tries: int
    slowdown: float = 0.0
    layers: bool = False
    threads: int = 1


SCENARIOS = {
    "equal": Scenario(200),
    "busy 5 %": Scenario(100, 0.05),
    "layers 5 %": Scenario(50, layers=True),
    "busy 10 %": Scenario(30, 0.10),
    "equal, 2 threads": Scenario(40, threads=2),
    "busy 5 %, 2 threads": Scenario(20, 0.05, threads=2),
    "busy 10 %, 2 threads": Scenario(10, 0.10, threads=2),
    "busy 3 %": Scenario(8, 0.03),
}


class Slowed:
    """An engine whose call takes a fixed share longer: it stays awake for that share."""

    def __init__(self, engine: Engine, share: float) -> None:
        self.engine, self.share = engine, share

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Run once, and stay for the share."""
        start = perf_counter()
        outputs = self.engine(inputs)
        end = start + (perf_counter() - start) * (1 + self.share)
        while perf_counter() < end:
            pass
        return outputs


def network() -> tuple[Any, str]:
    """A torch module for (1, 3, 32, 32), and its name."""
    import torch
    from torch import nn

    if (SHARED / "models" / "zoo.py").exists():
        return shared_module("models/zoo.py").load("cifar10_resnet8"), "cifar10_resnet8"
    torch.manual_seed(0)
    widths = [3, 16, 16, 32, 32, 64, 64]
    layers: list[nn.Module] = []
    for index, (before, after) in enumerate(itertools.pairwise(widths)):
        layers += [nn.Conv2d(before, after, 3, 2 if index in (2, 4) else 1, 1), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(*layers).eval(), "random"


def write_models(folder: Path) -> str:
    """`plain.onnx` and one file for each of `LAYERS`; the network's name."""
    import onnx_ir as ir
    import torch
    from torch import nn

    from compress.export import to_onnx
    from compress.loading import load

    module, name = network()
    torch.manual_seed(1)
    for layers in ("", *LAYERS):
        kernels = [int(one[0]) for one in layers.split()]
        extra = [nn.Conv2d(3, 3, kernel, padding=kernel // 2) for kernel in kernels]
        whole = nn.Sequential(*extra, module).eval()
        exported = to_onnx(load(whole, inputs=["1x3x32x32"]), 21)
        ir.save(exported.graph_model, folder / f"{layers or 'plain'}.onnx")
    return name


def true_cost(folder: Path, layers: str, seconds: float) -> dict[str, Any]:
    """What the layers cost, as candidate over baseline, from one long measurement."""
    sides = {
        BASELINE: open_subject(folder / "plain.onnx", threads=1),
        CANDIDATE: open_subject(folder / f"{layers}.onnx", threads=1),
    }
    pairs, start = Pairs(), perf_counter()
    sessions = each_session(fresh_sides(sides, 1), seconds=PAIR_SECONDS, min_blocks=ROUNDS)
    for session in sessions:
        pairs.add(session)
        if perf_counter() - start >= seconds and len(pairs) >= 10:
            break
    found = pairs.ratio("p50", ALPHA)
    return {"layers": layers, "pairs": len(pairs), **dataclasses.asdict(found)}


def one_try(folder: Path, scenario: Scenario, layers: str, seed: int) -> dict[str, Any]:
    """Verdict, pairs, seconds and the ratio of one check."""
    plain = folder / "plain.onnx"
    other = open_subject(plain, threads=scenario.threads)
    changed = folder / f"{layers}.onnx" if scenario.layers else plain
    own = open_subject(changed, threads=scenario.threads)
    if scenario.slowdown:
        build = own.build
        own = dataclasses.replace(own, build=lambda: Slowed(build(), scenario.slowdown))
    result = check_sides(own, other, budget=Budget(()), seed=seed)
    row = result.ratio
    if row is None:
        raise RuntimeError("A check of two sides has a ratio.")
    return {
        "verdict": result.verdict,
        "pairs": result.pairs,
        "looks": result.looks,
        "seconds": result.seconds,
        "ratio": row.value,
        "low": row.low,
        "high": row.high,
    }


def chunk(folder: Path, name: str, layers: str, first: int, count: int) -> dict[str, Any]:
    """Tries in a process of their own."""
    given = [sys.executable, "-W", "ignore", "-m", "benchmarks.gate", "--child", str(folder)]
    start = perf_counter()
    ran = subprocess.run(
        [*given, name, layers, str(first), str(count)],
        cwd=HERE.parent,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    tries = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    return {"tries": tries, "process_seconds": perf_counter() - start}


def child(folder: str, name: str, layers: str, first: str, count: str) -> None:
    for seed in range(int(first), int(first) + int(count)):
        print(json.dumps(one_try(Path(folder), SCENARIOS[name], layers, seed)), flush=True)


def command_seconds(folder: Path) -> dict[str, Any]:
    """Wall time of the whole command, imports included."""
    seconds = []
    plain = str(folder / "plain.onnx")
    script = [sys.executable, "-m", "compress.cli", "check", plain, "--against", plain]
    for _ in range(3):
        start = perf_counter()
        subprocess.run([*script, "--threads", "1"], check=True, capture_output=True)
        seconds.append(perf_counter() - start)
    return {"seconds": seconds}


def wilson(hits: int, tries: int, z: float = 1.959964) -> list[float]:
    """95 % interval of a share (Wilson, JASA 22, 1927)."""
    share, shrink = hits / tries, 1 + z * z / tries
    middle = (share + z * z / (2 * tries)) / shrink
    half = z * np.sqrt(share * (1 - share) / tries + z * z / (4 * tries * tries)) / shrink
    return [float(max(0, middle - half)), float(min(1, middle + half))]


def clopper_pearson(hits: int, tries: int) -> list[float]:
    """Exact 95 % interval of a share (Clopper & Pearson, Biometrika 26, 1934)."""
    low = beta.ppf(0.025, hits, tries - hits + 1) if hits else 0.0
    high = beta.ppf(0.975, hits + 1, tries - hits) if hits < tries else 1.0
    return [float(low), float(high)]


def summary(tries: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Rates with intervals, and times."""
    verdicts = [one["verdict"] for one in tries]
    seconds = [one["seconds"] for one in tries]
    failed = verdicts.count("fail")
    return {
        "tries": len(tries),
        **{verdict: verdicts.count(verdict) for verdict in ("pass", "fail", "cannot tell")},
        "fail_rate": failed / len(tries),
        "wilson": wilson(failed, len(tries)),
        "clopper_pearson": clopper_pearson(failed, len(tries)),
        "median_ratio": statistics.median(one["ratio"] for one in tries),
        "median_seconds": statistics.median(seconds),
        "max_seconds": max(seconds),
        "median_pairs": statistics.median(one["pairs"] for one in tries),
    }


def choose_layers(folder: Path, results: Results, seconds: float) -> str:
    """The layers nearest to 5 %, by a shorter measurement of each, then their true cost."""
    if "layers" not in results:
        short = [true_cost(folder, layers, seconds / 6) for layers in LAYERS]
        near = min(short, key=lambda one: abs(one["value"] - 1 - WANTED_COST))
        long = true_cost(folder, near["layers"], seconds)
        results.add("layers", {"tried": short, "chosen": long})
    return str(results.document["entries"]["layers"]["chosen"]["layers"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tries", type=float, default=1.0, help="share of the tries")
    parser.add_argument("--name", default="gate", help="of the results file")
    parser.add_argument("--only", nargs="*", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--out", type=Path, help="folder of the results file")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(*given.child)
        return
    settings = {
        "tries": given.tries,
        "max_slowdown": MAX_SLOWDOWN,
        "seconds": SECONDS,
        "alpha": ALPHA,
        "pair_seconds": PAIR_SECONDS,
        "block_seconds": BLOCK_SECONDS,
        "rounds": ROUNDS,
        "scenarios": {name: dataclasses.asdict(one) for name, one in SCENARIOS.items()},
    }
    results = Results(given.name, settings, given.out)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="gate-") as text:
        folder = Path(text)
        results.document["network"] = write_models(folder)
        layers = ""
        if any(SCENARIOS[name].layers for name in given.only):
            layers = choose_layers(folder, results, max(5.0, TRUTH_SECONDS * min(1, given.tries)))
        for name in given.only:
            wanted = max(1, round(SCENARIOS[name].tries * given.tries))
            tries: list[Mapping[str, Any]] = []
            for first in range(0, wanted, TRIES_PER_PROCESS):
                key = f"{name}/{first}"
                if key not in results:
                    count = min(TRIES_PER_PROCESS, wanted - first)
                    results.add(key, chunk(folder, name, layers, first, count))
                tries += results.document["entries"][key]["tries"]
            found = summary(tries)
            results.add(f"{name}/summary", found)
            print(f"{name}: {json.dumps(found)}", flush=True)
        if "command" not in results:
            results.add("command", command_seconds(folder))
    print(f"{time.perf_counter() - start:.0f} seconds, {results.path}")


if __name__ == "__main__":
    main()
