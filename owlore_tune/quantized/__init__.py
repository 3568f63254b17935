"""Layers whose weights have few bits on the device, and full precision on disk."""
