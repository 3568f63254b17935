"""The output of a run for the user: metrics, records, a manifest, a progress bar and a summary."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torchtune.training.metric_logging import DiskLogger, StdoutLogger, TensorBoardLogger
from torchtune.utils import get_logger
from tqdm import tqdm

from owlore_tune.config.components import build, printable
from owlore_tune.config.schema import plain
from owlore_tune.distributed.world import World, local
from owlore_tune.files import write_json
from owlore_tune.layers.projected import ProjectedLayers
from owlore_tune.layers.sampler import LayerSampler
from owlore_tune.layers.scores import SCORES_FILE, LayerScores
from owlore_tune.measure import MANIFEST, PeakMemory, machine, versions
from owlore_tune.memory.plan import MemoryPlan
from owlore_tune.optim.moments import state_bytes
from owlore_tune.training.components import LOGGER_METHODS
from owlore_tune.training.config import TrainingSettings
from owlore_tune.training.records import DRAWS_FILE, PICTURES, STEPS_FILE, Records

# The files of a run except checkpoints. torchtune's loggers write the config file.
OUTPUT_FILES = (
    MANIFEST,
    STEPS_FILE,
    DRAWS_FILE,
    SCORES_FILE,
    "torchtune_config.yaml",
    *(f"{name}.png" for name in PICTURES),
)

log = get_logger("INFO")


@dataclass
class Progress:
    """Counters of a run."""

    step: int = 0  # optimizer steps done, skipped ones included
    skipped_steps: int = 0  # without an update, because the loss or a gradient was not finite
    skipped_in_a_row: int = 0  # up to the current step
    trained_tokens: int = 0

    def is_due(self, every: int | None) -> bool:
        """Whether the number of steps is a multiple of ``every``; False if None."""
        return every is not None and self.step % every == 0

    def validation_due(self, every: int | None, num_steps: int) -> str | None:
        """The name of the held-out loss to measure now: ``before`` or ``step N``; None if none is due. That of the last
        step, ``after``, is not part of it."""
        if self.step == 0:
            return "before"
        return f"step {self.step}" if self.is_due(every) and self.step < num_steps else None

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)


class Report:
    """Sends metrics to the logger, writes records and the manifest to files, prints progress and a summary.

    Processes of ``world`` except the first one only keep records.

    Args:
        directory: the run's output directory.
        world: the processes that train together.
    """

    def __init__(self, directory: Path, world: World) -> None:
        self._directory = directory
        self._run_id = ""
        self._is_first = world.rank == 0
        self.records = Records(directory if self._is_first else None)
        self._logger: Any = None
        self._facts: dict[str, Any] = {}
        self._bar: tqdm | None = None
        self._log_every: int | None = None

    def start(
        self,
        settings: TrainingSettings,
        run_id: str,
        step: int,
        plan: MemoryPlan,
        scores: LayerScores,
        sampler: LayerSampler,
        measure_memory: Callable[[], dict[str, int]],
    ) -> None:
        """Open the metric logger, log the config through it, write the scores, and begin the files of the records.

        Args:
            run_id: of the directory.
            step: optimizer steps that a resumed run has done.
            plan: memory plan.
            scores: of the layers.
            sampler: of the layers, for each one's probability to be in a draw.
            measure_memory: returns bytes by category, see `measured_bytes`.
        """
        cfg, self._run_id, self._log_every = settings.cfg, run_id, settings.cfg.log_every_n_steps
        with redirect_stdout(StringIO()):  # some print their path; docs/runs.md documents it
            self._logger = build("metric_logger", cfg.metric_logger, attributes=LOGGER_METHODS)
        # Other loggers resolve the config before they send it elsewhere, but environment variables may be secret.
        if not isinstance(self._logger, DiskLogger | StdoutLogger | TensorBoardLogger):
            cfg = printable(cfg)
            cfg.output_dir = str(self._directory)  # the logger writes a file there
        self._logger.log_config(cfg)
        self._plan, self.measure_memory = plan, measure_memory
        self._facts = {
            "versions": versions(),
            "machine": machine(settings.device),
            "config": plain(settings.cfg),
            "seed": cfg.seed,
            "probabilities": sampler.probabilities.tolist(),
        }
        if self._is_first:
            scores.save(self._directory / SCORES_FILE)
        self.records.start(step, run_id)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the seconds of the block to ``phase``."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.records.add_seconds(phase, time.perf_counter() - started)

    @contextmanager
    def progress_bar(self, progress: Progress, num_steps: int) -> Iterator[None]:
        """Show a progress bar of the steps in the block."""
        with tqdm(
            total=num_steps, initial=progress.step, unit="step", dynamic_ncols=True, disable=not self._is_first
        ) as self._bar:
            yield

    def draw(self, step: int, active: list[int], trainable: int, last_moved: list[int]) -> None:
        """Record new active layers, and log the draw that they replace."""
        self.close_draw(step, last_moved)
        self.records.open_draw(step, active, trainable)

    def close_draw(self, step: int, moved: list[int]) -> None:
        """Log the current draw, which ends at ``step``, and of whose layers ``moved`` have changed."""
        if (draw := self.records.close_draw(step, moved)) is None:
            return
        if still := sorted(set(draw["active"]) - set(moved)):
            log.warning(
                f"The weights of layers {', '.join(map(str, still))} did not change in the draw of step "
                f"{draw['step']}: its steps were skipped, or the updates were 0."
            )
        metrics = {
            "num_active_layers": len(draw["active"]),
            "moved_layers": len(moved),
            "trainable_parameters": draw["trainable"],
        }
        self.log(metrics, step)

    def step(self, progress: Progress, metrics: dict[str, float]) -> None:
        """Record an optimizer step, which ``progress`` counts. Every ``log_every_n_steps``, also log it."""
        metrics = {"step": progress.step, **metrics}
        self.records.add_step(metrics)
        if self._bar is not None and self.records.draw is not None:
            self._bar.update()
            self._bar.set_postfix_str(
                f"loss {metrics['loss']:.3f}, lr {metrics['lr']:.1e}, {metrics['tokens_per_second']:.0f} tokens/s, "
                f"layers {','.join(map(str, self.records.draw['active']))}"
            )
        if progress.is_due(self._log_every):
            self.log(metrics, progress.step)

    def held_out_loss(self, when: str, step: int, loss: float, num_tokens: int) -> None:
        """Record and log a held-out loss.

        Args:
            when: ``before``, ``step N`` or ``after``.
        """
        self.records.losses[when] = loss
        log.info(f"Held-out loss, {when}: {loss:.4f} over {num_tokens} tokens")
        self.log({"val_loss": loss}, step)

    def log(self, metrics: dict[str, float], step: int) -> None:
        if self._logger is None:
            return
        try:
            self._logger.log_dict(metrics, step=step)
        except OSError as error:  # such as a full disk
            log.warning(f"metric_logger: step {step} cannot be logged: {error}")

    def write_manifest(self, progress: Progress, checkpoint: Path, *, finished: bool = False) -> None:
        """
        Args:
            checkpoint: checkpoint of the last step; recorded if it exists.
        """
        if not self._is_first:
            return
        records = self.records
        content = self._facts | {
            "steps": progress.step,
            "finished": finished,
            "skipped_steps": progress.skipped_steps,
            "checkpoint": checkpoint.name if checkpoint.is_dir() else None,
            "held_out_loss": records.losses,
            "seconds": records.seconds,
            **records.speed(),
            "memory_bytes": {
                "planned": asdict(self._plan) | {"total": self._plan.total},
                "measured": self.measure_memory(),
            },
            "draws": records.draws,
        }
        try:
            write_json(self._directory / MANIFEST, content, self._run_id)
        except OSError as error:
            log.warning(f"{self._directory / MANIFEST} cannot be written: {error}")

    def print_summary(self, checkpoint: Path) -> None:
        """Draw the pictures of the run, and print its results."""
        if not self._is_first:
            return
        from owlore_tune.training import plots

        try:
            pictures = ", ".join(picture.name for picture in plots.plot_run(self._directory)) + " beside it"
        except Exception as error:  # of matplotlib, or a full disk: the run itself is complete
            pictures = f"cannot be drawn: {error}"
        losses = [f"{when} {loss:.4f}" for when, loss in self.records.losses.items() if when in ("before", "after")]
        speed, peak = self.records.speed(), self.measure_memory()["total"]
        print(
            f"held-out loss   {', '.join(losses) or 'not measured'}\n"
            f"median step     {speed['median_step_seconds'] or 0:.2f} s\n"
            f"throughput      {speed['tokens_per_second'] or 0:.0f} tokens/s\n"
            f"peak memory     {peak / 1e9:.2f} GB (planned {self._plan.total / 1e9:.2f} GB)\n"
            f"weights         {checkpoint}\n"
            f"manifest        {self._directory / MANIFEST}\n"
            f"pictures        {pictures}"
        )

    def close(self) -> None:
        if self._logger is None:
            return
        try:
            self._logger.close()
        except OSError as error:
            log.warning(f"metric_logger cannot be closed: {error}")


def measured_bytes(
    model: nn.Module, layers: ProjectedLayers, optimizer: Optimizer, peak: PeakMemory, device: Any
) -> dict[str, int]:
    """Bytes in use on this process by category, and their peak so far as ``total``. Host memory apart from ``device``
    counts for weights only."""
    return {
        "weights": sum(local(tensor).nbytes for tensor in (*model.parameters(), *model.buffers())),
        "projected": sum(weight.trained.nbytes for _, weight in layers.active_weights()),
        "moments": state_bytes(optimizer, device),
        "bases": layers.nbytes(),
        "total": peak.read(),
    }


def state_gb(optimizer: Optimizer, layers: ProjectedLayers, device: Any) -> float:
    """GB on ``device`` of the optimizer's state and of bases."""
    return (state_bytes(optimizer, device) + layers.nbytes()) / 1e9
