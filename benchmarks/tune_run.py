"""One `tune run` as a process of its own, with the memory that it took."""

import os
import subprocess
import sys
from pathlib import Path


def tune_run(recipe: str, config: str | Path, *overrides: str, log: Path) -> float:
    """Run a recipe to its end, output to ``log``; the benchmarks' own modules can be components of its config.

    Returns:
        The largest resident size of the process, loading and saving included, in GB.

    Raises:
        SystemExit: with the log's end, if the run fails.
    """
    command = ["tune", "run", recipe, "--config", str(config), *overrides]
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
