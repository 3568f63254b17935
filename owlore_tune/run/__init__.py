"""A training run: its settings, its parts built from a config, its directory, its report and its resume."""
