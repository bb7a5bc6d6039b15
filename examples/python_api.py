"""The Python API on what `make demo` left behind in demo/.

python examples/python_api.py
"""

from __future__ import annotations

import numpy as np

import compress


def main() -> None:
    result = compress.run(
        "demo/model.pt",
        target="cpu",
        bits=8,
        inputs=[compress.TensorSpec.parse("1x1x32x32")],
        calibration="demo/digits_calibration.npz",
        evaluate="demo/digits_test.npz",
        max_drop="1%",
        out="demo/digits-python",
        overwrite=True,
    )
    print(result.report.markdown())

    engine = compress.load(result.directory)
    images = np.load("demo/digits_test.npz")["x"][:8]
    outputs = engine({engine.inputs[0].name: images})
    print("Predicted digits:", outputs[engine.outputs[0]].argmax(axis=1))


if __name__ == "__main__":
    main()
