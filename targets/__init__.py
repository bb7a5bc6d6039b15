"""Targets: where an artifact runs. `cpu` runs it with ONNX Runtime on this machine's processor."""
