"""Kill one rank of a run at random moments, resume until it finishes, and compare with an uninterrupted run.

    python benchmarks/faults_distributed.py [--kills 10] [--ranks 2] [--seed 0] [--output FILE]

Ranks run without torchrun, so no agent stops the other ranks. Half of the kills come at a random time, half during a
save. After each kill, the other ranks must exit with an error within `dist_timeout_s`, and the newest checkpoint must
be readable.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from faults import config_for, weights
from omegaconf import OmegaConf
from report import command, machine, parser, publish

from owlore_tune.run.directory import RunDirectory

TIMEOUT = 30  # dist_timeout_s, in seconds


def start(config: Path, num_ranks: int) -> list[subprocess.Popen]:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = str(opened.getsockname()[1])
    ranks = []
    for rank in range(num_ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks), "MASTER_PORT": port}
        environment = os.environ | place | {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "owlore_full_finetune", "--config", str(config)]
        ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    return ranks


def kill_somewhere(ranks: list[subprocess.Popen], output_dir: Path, seconds: float, rng: random.Random) -> bool:
    """Kill a rank after the next checkpoint, at a random moment or during a save. Returns whether during a save."""
    before = set(RunDirectory.existing(output_dir).steps.own())
    while set(RunDirectory.existing(output_dir).steps.own()) == before and all(rank.poll() is None for rank in ranks):
        time.sleep(0.002)
    if rng.random() < 0.5:
        time.sleep(rng.uniform(0, seconds))
    else:
        while not any(output_dir.glob("step_*.partial")) and all(rank.poll() is None for rank in ranks):
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.02))
    victim = rng.choice(ranks)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    return any(output_dir.glob("step_*.partial"))


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--kills", type=int, default=10)
    arguments.add_argument("--ranks", type=int, default=2)
    arguments.add_argument("--seed", type=int, default=0)
    args = arguments.parse_args()
    rng = random.Random(args.seed)
    counts = {
        "kills": 0,
        "kills in a save": 0,
        "ranks that did not exit in time": 0,
        "ranks that exited without an error": 0,
    }
    counts |= {"unreadable newest checkpoints": 0, "runs not bit-equal": 0, "runs": 0}
    slowest = 0.0
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        config = config_for("small", scratch) | {"dist_timeout_s": TIMEOUT, "keep_last_n": 3}

        def written(output_dir: Path) -> Path:
            file = output_dir.with_suffix(".yaml")
            file.write_text(OmegaConf.to_yaml(OmegaConf.create(config | {"output_dir": str(output_dir)})))
            return file

        assert all(rank.wait() == 0 for rank in start(written(scratch / "unbroken"), args.ranks))
        steps = [json.loads(line) for line in (scratch / "unbroken" / "steps.jsonl").read_text().splitlines()]
        seconds = sum(step["step_seconds"] for step in steps)
        expected = weights(scratch / "unbroken")
        while counts["kills"] < args.kills:
            output_dir = scratch / f"run_{counts['runs']}"
            for attempt in range(4):
                ranks = start(written(output_dir), args.ranks)
                if attempt < 3 and counts["kills"] < args.kills:
                    counts["kills in a save"] += kill_somewhere(ranks, output_dir, seconds / 2, rng)
                    counts["kills"] += 1
                    killed = time.monotonic()
                    for rank in ranks:
                        try:
                            code = rank.wait(TIMEOUT + 10)
                            # After the last save, only the first rank still has work: it draws the plots.
                            finished = json.loads((output_dir / "manifest.json").read_text())["finished"]
                            counts["ranks that exited without an error"] += code == 0 and not finished
                        except subprocess.TimeoutExpired:
                            counts["ranks that did not exit in time"] += 1
                            rank.kill()
                    slowest = max(slowest, time.monotonic() - killed)
                    try:
                        RunDirectory.existing(output_dir).steps.newest()
                    except Exception as error:
                        print(error)
                        counts["unreadable newest checkpoints"] += 1
                else:
                    assert all(rank.wait() == 0 for rank in ranks)
                    break
            got = weights(output_dir)
            counts["runs not bit-equal"] += not all((got[key] == weight).all() for key, weight in expected.items())
            counts["runs"] += 1
            print(counts, flush=True)
    lines = [
        f"# Losing one of {args.ranks} ranks",
        "",
        f"A small model under SIGKILL to one rank, seed {args.seed}; dist_timeout_s={TIMEOUT}; {machine()}. The "
        f"slowest rank exited {slowest:.1f} s after the kill. Command: {command()}.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in counts.items()),
    ]
    publish(lines, args.output)
    bad = [key for key in counts if key.startswith(("ranks", "unreadable", "runs not")) and counts[key]]
    sys.exit(json.dumps(counts) if bad else 0)


if __name__ == "__main__":
    main()
