"""Errors for users: programs print only their message, in one line, without a traceback."""


class ConfigError(ValueError):
    """A config that cannot run. The message names the value and the fix."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read. The message names the file and the reason."""


class RunError(RuntimeError):
    """A run that had to stop. The message says how far it got and how to continue."""


class DivergedError(RunError):
    """A run with a loss or weights that are not finite. Its state is not worth saving."""
