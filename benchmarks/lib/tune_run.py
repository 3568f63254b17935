"""Run a command in a separate process and measure its memory."""

import os
import subprocess
import sys
from pathlib import Path

LIB = Path(__file__).parent


def run_process(command: list[str], log: Path, threads: int | None = None) -> float:
    """Run a command, and write its output to ``log``. Modules beside this one can be recipes or config components.

    Returns:
        The peak resident size of the process in GB, including loading and saving.

    Raises:
        SystemExit: with the end of the log, if the command fails.
    """
    path = os.pathsep.join([str(LIB), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if status != 0:
        sys.exit(f"{' '.join(command)} failed:\n{log.read_text()[-3000:]}")
    return usage.ru_maxrss * 1024 / 1e9
