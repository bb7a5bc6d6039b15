"""Latency estimates: what a model will take on a target, with an interval and where it is from."""
