"""A training run: its components, output directory, checkpoints to resume from, validation and report."""
