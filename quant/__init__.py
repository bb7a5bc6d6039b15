"""Quantization: quantizer maths, observers, calibration, the plan and its QDQ emitter.

Found through the entry point `quantize`; `compress run --bits 8` puts it into the recipe.
"""
