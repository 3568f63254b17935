"""One run as a process of its own, with the memory that it took."""

import os
import subprocess
import sys
from pathlib import Path


def tune_run(recipe: str, config: str | Path, *overrides: str, log: Path) -> float:
    """`tune run` of a recipe to its end; the benchmarks' own modules can be recipes, or components of its config."""
    return run_process(["tune", "run", recipe, "--config", str(config), *overrides], log=log)


def run_process(command: list[str], log: Path) -> float:
    """Run a command to its end, output to ``log``.

    Returns:
        The largest resident size of the process, loading and saving included, in GB.

    Raises:
        SystemExit: with the log's end, if it fails.
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
