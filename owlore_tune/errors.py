"""Errors whose message is all that a user needs: programs print them in one line, without a traceback."""


class ConfigError(ValueError):
    """A config that cannot run. The message names the value and the way out."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read. The message names the file and the reason."""


class RunError(RuntimeError):
    """A run that had to stop. The message says where it stands and how to continue."""


class DivergedError(RunError):
    """A run whose loss or weights are not finite. Its state is not worth a checkpoint."""
