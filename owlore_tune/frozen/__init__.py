"""Layers that don't train now: few bits on the device, full precision on disk."""
