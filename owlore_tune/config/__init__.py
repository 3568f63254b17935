"""Configs: their fields, how they are read, and the components that they name."""
