"""Pruning. This release has no pruning pass yet; passes arrive with later releases."""
