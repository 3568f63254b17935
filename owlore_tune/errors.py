"""Errors for users: programs print only their message, in one line, without a traceback. Imports nothing heavy."""

import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version


class ConfigError(ValueError):
    """A config that cannot run. The message names the value and the fix."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read. The message names the file and the reason."""


class RunError(RuntimeError):
    """A run that had to stop. The message says how far it got and how to continue."""


class DivergedError(RunError):
    """A run with a loss or weights that are not finite. Its state is not worth saving."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory was short, on a device or, where torch raises a plain RuntimeError, on the host."""
    names = {base.__name__ for base in type(error).__mro__}
    return not names.isdisjoint({"MemoryError", "OutOfMemoryError"}) or "DefaultCPUAllocator" in str(error)


def message_of(error: Exception) -> str:
    """The message of an error in one line. Python's MemoryError has none."""
    return " ".join(str(error).split()) or ("out of memory" if is_out_of_memory(error) else type(error).__name__)


# Classes of errors that a user can solve. Those of other packages are named, because importing them takes seconds.
_OURS = (ConfigError, CheckpointError, RunError, OSError)
_OTHERS = {"InstantiationError", "OmegaConfBaseException", "RankError"}


# Warnings of other packages that a user can do nothing about: torchdata's loader, and torchtune's norms in 16 bits.
_IGNORED = ("'set_vital' is deprecated", "Mismatch dtype between input and weight")


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Exit with ``error: ...`` if the block raises an error that a user can solve. Any other error is a bug: it shows
    its traceback, and a line that says so. Warnings that a user can do nothing about are not shown."""
    for message in _IGNORED:
        warnings.filterwarnings("ignore", message=message)
    try:
        yield
    except Exception as error:
        names = (base.__name__ for base in type(error).__mro__)
        if isinstance(error, _OURS) or is_out_of_memory(error) or not _OTHERS.isdisjoint(names):
            sys.exit(f"error: {message_of(error)}")
        traceback.print_exc()
        sys.exit(
            f"error: {type(error).__name__}, a bug in owlore-tune {version('owlore-tune')}. Please report it in the "
            "project's issue tracker, with the command and the lines above"
        )
