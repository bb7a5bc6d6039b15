"""Distillation. This release has no distillation pass yet; passes arrive with later releases."""
