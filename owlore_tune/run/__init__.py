"""A training run: settings, components, output directory, report and resume."""
