"""ONNX graphs in torch: operators, and an executor that gives every tensor by its name."""
