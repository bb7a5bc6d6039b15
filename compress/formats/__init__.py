"""Readers of model files, one module for each kind; `compress.loading` chooses among them."""
