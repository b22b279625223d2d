"""Quantised weights: one file a format, each of which says what it makes of a module's tensors."""
