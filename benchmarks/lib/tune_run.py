"""Run a command in a separate process and measure its memory."""

import os
import subprocess
import sys
from pathlib import Path


def tune_run(recipe: str, config: str | Path, *overrides: str, log: Path) -> float:
    """`tune run` a recipe. Modules beside this one can be used as recipes or config components."""
    return run_process(["tune", "run", recipe, "--config", str(config), *overrides], log=log)


def run_process(command: list[str], log: Path) -> float:
    """Run a command, and write its output to ``log``.

    Returns:
        The peak resident size of the process in GB, including loading and saving.

    Raises:
        SystemExit: with the end of the log, if the command fails.
    """
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if status != 0:
        sys.exit(f"{' '.join(command)} failed:\n{log.read_text()[-3000:]}")
    return usage.ru_maxrss * 1024 / 1e9
