"""From nothing to a measured int8 artifact: train, save, `compress run`, load.

    python examples/demo.py [FOLDER]

Trains a small ConvBN network on scikit-learn's bundled digits (1,797 scans of handwritten
digits, 8x8 pixels, here enlarged to 32x32), saves it as a user would, and calls the command.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

EPOCHS = 4
SIDE = 32


def digits() -> tuple[np.ndarray, np.ndarray]:
    """All images (1797, 1, 32, 32) float32, standardized, in random order, and their labels."""
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float()[:, None]
    images = functional.interpolate(images, size=SIDE, mode="bilinear", align_corners=False)
    images = (images - images.mean()) / images.std()
    order = np.random.default_rng(0).permutation(len(images))
    return images.numpy()[order], bunch.target[order]


def network() -> nn.Sequential:
    """Six ConvBN layers of torch.nn's own classes, wide enough for int8 to pay."""

    def conv(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
        layer = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        return [layer, nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *conv(1, 32, stride=2),
        *conv(32, 64),
        *conv(64, 64, stride=2),
        *conv(64, 128),
        *conv(128, 128, stride=2),
        *conv(128, 128),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def train(model: nn.Sequential, x: np.ndarray, y: np.ndarray) -> None:
    """A plain training loop; shifts by up to two pixels are the only augmentation."""
    images, labels = torch.from_numpy(x), torch.from_numpy(y)
    steps = EPOCHS * -(-len(x) // 32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
    model.train()
    for epoch in range(EPOCHS):
        for batch in torch.randperm(len(x)).split(32):
            shift = tuple(int(s) for s in torch.randint(-2, 3, (2,)))
            shifted = images[batch].roll(shift, dims=(2, 3))
            loss = functional.cross_entropy(model(shifted), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"  epoch {epoch + 1} of {EPOCHS}, loss {loss.item():.3f}", flush=True)
    model.eval()


def main() -> int:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "demo")
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    x, y = digits()
    print(f"Training on {len(x) - 500} scans of handwritten digits")
    start = time.perf_counter()
    model = network()
    train(model, x[500:], y[500:])
    print(f"  {time.perf_counter() - start:.0f} seconds")

    torch.save(model, folder / "model.pt")
    np.savez(folder / "digits_calibration.npz", x=x[500:756])
    np.savez(folder / "digits_test.npz", x=x[:500], y=y[:500])

    script = Path(sys.executable).with_name("compress")
    options = (
        f"run model.pt --target cpu --bits 8 --input 1x1x{SIDE}x{SIDE} "
        "--calibration digits_calibration.npz --eval digits_test.npz --max-drop 1% "
        "--out digits-int8 --force"
    )
    print(f"\n$ cd {folder} && compress {options}\n", flush=True)
    ran = subprocess.run([str(script), *shlex.split(options)], cwd=folder, check=False)
    if ran.returncode not in (0, 1):
        return ran.returncode
    artifact = os.path.relpath(folder / "digits-int8")
    print(f"\nThe artifact is in {artifact}; its report is {artifact}/report.md. To use it:")
    print("    import compress, numpy")
    print(f"    engine = compress.load({artifact!r})")
    print(
        f"    outputs = engine({{engine.inputs[0].name: "
        f"numpy.zeros((1, 1, {SIDE}, {SIDE}), numpy.float32)}})"
    )
    return ran.returncode


if __name__ == "__main__":
    sys.exit(main())
