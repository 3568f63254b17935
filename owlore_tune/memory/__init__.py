"""Planned and measured memory of a run."""
