"""Commands in processes of their own, forked from one that has imported everything, which saves seconds for each."""

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

_FORK = multiprocessing.get_context("forkserver")
_FORK.set_forkserver_preload(
    [
        "owlore_full_finetune",
        "owlore_eval",
        "owlore_tune.cli",
        "torchtune._cli.tune",
        # Commands import these when they need them.
        "lm_eval.tasks",
        "matplotlib.pyplot",
        "torchtune.models.llama3_2",
        "transformers.models.llama.modeling_llama",
    ]
)


def fork(
    function: Callable[..., None], *arguments: object, output: Path, errors: Path | None = None,
    cwd: Path | None = None, environment: Mapping[str, str] | None = None,
) -> BaseProcess:  # fmt: skip
    """Start ``function`` in a process that writes to the files ``output`` and ``errors``, or to one for both.

    Args:
        cwd: its directory; default: this process's.
        environment: variables besides those of this process.
    """
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}  # also for processes that it starts
    place = (str(output), str(errors or output), str(cwd or Path.cwd()), variables)
    process = _FORK.Process(target=_enter, args=(*place, function, arguments), daemon=True)  # ends with the tests
    process.start()
    return process


def _enter(
    output: str, errors: str, cwd: str, environment: dict[str, str], function: Callable[..., None], arguments: tuple
) -> None:
    for stream, file in ((1, output), (2, errors)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    function(*arguments)


def _run_script(*words: str) -> None:
    (script,) = entry_points(group="console_scripts", name=words[0])
    sys.argv = list(words)
    sys.exit(script.load()())


class Command:
    """A running command, such as ``tune run …``. Its methods are those of `subprocess.Popen` that tests use."""

    def __init__(self, *words: str, cwd: Path | None = None, environment: Mapping[str, str] | None = None) -> None:
        self._directory = tempfile.TemporaryDirectory()
        self._files = [Path(self._directory.name) / name for name in ("output", "errors")]
        output, errors = self._files
        self._process = fork(_run_script, *words, output=output, errors=errors, cwd=cwd, environment=environment)
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Wait for its end, and return its output and errors. Kill it after ``timeout`` seconds."""
        self._process.join(timeout)
        if ended_late := self.returncode is None:
            self._process.kill()
            self._process.join()
        output, errors = (file.read_text() if file.exists() else "" for file in self._files)
        assert not ended_late, f"not ended after {timeout} s:\n{output[-1000:]}\n{errors[-2000:]}"
        return output, errors


def run_command(*words: str, cwd: Path | None = None) -> str:
    """Run a command that must succeed, and return its output."""
    command = Command(*words, cwd=cwd)
    output, errors = command.communicate()
    assert command.returncode == 0, f"{' '.join(words)}\n{output[-1000:]}\n{errors[-2000:]}"
    return output
