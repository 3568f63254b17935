"""Fine-tune all weights of a model, a few layers at a time (OwLore, arXiv 2405.18380), on one device or several.

tune run owlore_full_finetune --config smollm2/135M_owlore [field=value ...]
tune run --nproc_per_node 2 owlore_full_finetune --config llama2/7B_owlore [field=value ...]
"""

import math
import sys
import time
from dataclasses import asdict
from datetime import datetime
from functools import partial
from pathlib import Path
from signal import Signals
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torchtune import training, utils
from torchtune.recipe_interfaces import FTRecipeInterface
from torchtune.training.lr_schedulers import get_lr

from owlore_tune.checkpoints.optimizer import OptimizerState
from owlore_tune.checkpoints.state import load_state, save_checkpoint
from owlore_tune.clock import Clock
from owlore_tune.data.loader import Batch
from owlore_tune.data.tokenizer import check_vocabulary
from owlore_tune.distributed.fsdp import shard_model
from owlore_tune.distributed.grads import clip_grad_norm_, sum_grads
from owlore_tune.distributed.launch import process_group
from owlore_tune.distributed.world import current_world
from owlore_tune.errors import CheckpointError, DivergedError, RunError
from owlore_tune.heap import reuse_freed_memory
from owlore_tune.layers.projected import ProjectedLayers
from owlore_tune.layers.schedule import Refresh
from owlore_tune.layers.scores_file import SCORES_FILE, LayerScores
from owlore_tune.loss import mean_loss, shift_labels
from owlore_tune.memory.measure import PeakMemory
from owlore_tune.models.attention import attend_by_sample
from owlore_tune.models.decoder import Decoder, find_layers
from owlore_tune.optim.moments import state_bytes
from owlore_tune.program import parse
from owlore_tune.run import build, resume
from owlore_tune.run.compiled import compile_parts
from owlore_tune.run.directory import RunDirectory, shared_directory
from owlore_tune.run.planning import check_limit, plan_run
from owlore_tune.run.progress import Progress
from owlore_tune.run.report import Report, measured_bytes
from owlore_tune.run.rng import RngState
from owlore_tune.run.scoring import read_scores
from owlore_tune.run.settings import TrainingSettings
from owlore_tune.run.signals import Stop, stop_request
from owlore_tune.run.validation import bad_gradients, check_finite_weights, full_precision_loss, held_out_loss
from owlore_tune.run.weights import Loading, load_and_score, weight_writer

log = utils.get_logger("INFO")

# Errors from data, files or memory. Any other error is a bug and shows its traceback.
EXPECTED_ERRORS = (ValueError, OSError, RunError, CheckpointError, torch.OutOfMemoryError)


class OwLoreFullFinetuneRecipe(FTRecipeInterface):
    """OwLore on one device, or under torchrun on several, with weights that FSDP2 shards or that every device has.

    `setup` checks everything that can be checked before weights load. Then it loads the weights, scores the layers and
    sets up the schedule of active layers. `train` draws new layers from that schedule every K steps. Full fine-tuning,
    LISA and GaLore are settings of the ``owlore`` block; see configs/smollm2.

    An interrupted run continues with ``resume_from_checkpoint=true``. Resumed on the same number of CPU ranks, it is
    bit-identical to an uninterrupted one. A step whose loss or gradient is not finite is skipped;
    ``max_skipped_steps`` of them in a row stop the run.

    Args:
        settings: of the run; see `owlore_tune.run.settings` for the fields of its config.

    Raises:
        ConfigError: if a setting does not go with the number of processes.
    """

    _loss_fn: Any
    _model: Decoder
    _layers: ProjectedLayers
    _optimizer: torch.optim.Optimizer

    def __init__(self, settings: TrainingSettings) -> None:
        self._settings = settings
        self._cfg, self._device = settings.cfg, settings.device
        self._is_sharded = dist.is_initialized() and settings.shards()
        settings.check_launch(sharded=self._is_sharded)
        self._world = current_world()
        self._run = RunDirectory(settings.output_dir, "training")
        self._report = Report(settings.output_dir, self._world)
        self._progress = Progress()
        self._clock = Clock(self._device)
        self._rng = RngState(self._world)
        self._has_unproven_checkpoint = False
        self._is_complete = True  # weights, optimizer and counters agree on ``progress.step``
        training.set_seed(seed=settings.cfg.seed)
        reuse_freed_memory(self._device)
        self._memory = PeakMemory(self._device)

    def setup(self) -> None:
        settings, cfg, world = self._settings, self._cfg, self._world
        shared_directory(cfg.output_dir, world)
        settings.check_log_directories()
        self._resume_dir = resume.find_checkpoint(self._run, cfg.resume_from_checkpoint, world)
        saved = load_state(self._resume_dir) if self._resume_dir else None
        self._setup_inputs(saved)
        self._setup_model()
        known = LayerScores(**saved["scores"]) if saved else self._read_scores()
        self.load_checkpoint(known)
        self._sampler = build.build_sampler(settings, self._scores.scores)
        self._layers.masters = self._quantized
        self._schedule = build.build_schedule(settings, self._layers, self._optimizer, self._sampler)
        if cfg.compile:  # after scoring, whose hooks would be compiled too
            self._loss_fn = compile_parts(self._loss_fn, self._model, self._layers)
        self._lr_scheduler = build.build_lr_scheduler(settings, self._optimizer, self._data.num_steps)
        if saved is not None:
            self._restore(saved)
        self._start_run()

    def _setup_inputs(self, saved: dict[str, Any] | None) -> None:
        """Build data, tokenizer and checkpointer, and check that they are those of the checkpoint to resume from."""
        settings, now = self._settings, None
        if saved is not None:
            resume.check_settings(saved["identity"], settings, self._resume_dir)
            now = datetime.fromisoformat(saved["identity"]["now"])
        self._inputs = build.build_inputs(settings, self._world, now)
        self._checkpointer, _, self._data, self._held_out = self._inputs
        self._identity = resume.identity(settings, self._inputs, self._world)
        if saved is not None:
            resume.check_inputs(saved["identity"], self._identity, self._resume_dir)

    def _setup_model(self) -> None:
        """Build loss, model and optimizer without weights, and check their memory plan against the limit."""
        settings, cfg = self._settings, self._cfg
        build.check_late_components(settings)
        self._loss_fn, self._model, self._layers, self._optimizer = built = build.build_parts(settings, self._world)
        self._checkpointer.check_model(self._model)
        check_vocabulary(self._inputs.tokenizer, self._model)
        build.limit_row_lengths(self._inputs, self._model.max_seq_len)
        seq_len = build.row_length(settings, self._inputs)
        sharding = settings.sharding(self._world.size) if self._is_sharded else None
        self._plan = plan_run(settings, seq_len, sharding, parts=built)
        check_limit(settings, self._plan, seq_len, sharding)
        if self._device.type == "cpu" and not cfg.compile:
            attend_by_sample(self._model)
        self._profiler = build.build_profiler(settings)
        if cfg.enable_activation_checkpointing:
            layer_types = {type(layer) for layer in find_layers(self._model)}
            training.set_activation_checkpointing(self._model, auto_wrap_policy=layer_types)
        self._weights_device = self._device
        if sharding is not None:  # which replaces the parameters
            self._weights_device = shard_model(self._model, self._device, sharding)
            self._layers, self._optimizer = build.build_trained(settings, self._model, self._world)

    def _read_scores(self) -> LayerScores | None:
        fingerprint = self._identity["digests"][resume.BASE_WEIGHTS]
        return read_scores(self._settings, fingerprint, len(find_layers(self._model)))

    def load_checkpoint(self, known: LayerScores | None) -> None:
        """Load the weights, from the checkpoint to resume from if there is one, and score the layers."""
        loading = Loading(
            self._settings, self._inputs, self._model, self._run, self._resume_dir, self._weights_device, self._world
        )
        fingerprint = self._identity["digests"][resume.BASE_WEIGHTS]
        self._quantized, self._scores = load_and_score(loading, self._report, known, fingerprint)

    def _stateful(self) -> dict[str, Any]:
        """The objects with state in a checkpoint. The optimizer's state depends on the schedule before it."""
        stateful = {
            "progress": self._progress,
            "schedule": self._schedule,
            "optimizer": OptimizerState(self._optimizer, self._world),
            "lr_scheduler": self._lr_scheduler,
            "report": self._report,
            "rng": self._rng,
        }
        return {name: owner for name, owner in stateful.items() if owner is not None}

    def _restore(self, saved: dict[str, Any]) -> None:
        try:
            for name, owner in self._stateful().items():
                owner.load_state_dict(saved[name])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"{self._resume_dir} holds another state than this run saves: {error!r}") from error
        self._data.seek(self._progress.step)
        self._has_unproven_checkpoint = True  # the one that it resumes from
        self._world.attempt(lambda: self._run.steps.set_aside_after(self._progress.step), first_alone=True)
        log.info(f"Resumed from {self._resume_dir}, step {self._progress.step}.")

    def _start_run(self) -> None:
        """Mark the directory as this run's, then write its first files."""
        if self._quantized is not None:
            self._world.attempt(self._quantized.store.check_space, first_alone=True)
        self._world.attempt(self._run.start, first_alone=True)
        if self._quantized is not None:
            self._quantized.fill_store()
        self._world.attempt(self._start_report, first_alone=True)

    def _start_report(self) -> None:
        self._scores.save(self._settings.output_dir / SCORES_FILE)
        parts = (self._model, self._layers, self._optimizer, self._memory, self._device)
        probabilities = self._sampler.probabilities.tolist()
        self._report.start(self._settings, self._run.run_id, self._plan, probabilities, partial(measured_bytes, *parts))
        self._write_manifest()

    def train(self) -> None:
        try:
            if self._progress.step == 0:
                self._validate("before")
            self._memory.start()
            # A signal takes effect after the end of a step and its checkpoint.
            with stop_request().deferred(), self._profiler:
                self._train_loop()
            self._finish()
        except Exception as error:
            can_save = self._is_complete and not self._schedule.is_changing
            save = self._save_whole_step if can_save else None
            note = resume.rescue(error, self._run, self._progress.step, self._world, save)
            if isinstance(error, EXPECTED_ERRORS):
                raise RunError(f"{error}. {note}") from error
            print(note, file=sys.stderr)
            raise

    def _train_loop(self) -> None:
        """Train to the last step.

        Raises:
            Stop: after the step in which a signal arrived, once that step is saved.
            DivergedError: after ``max_skipped_steps`` skipped steps in a row.
        """
        progress, cfg, num_steps = self._progress, self._cfg, self._data.num_steps
        with self._report.progress_bar(progress, num_steps):
            while progress.step < num_steps:
                started = time.perf_counter()
                with self._clock("redraw"):
                    if (active := self._schedule.begin_step()) is not None:
                        trainable, last_moved = self._layers.num_trainable(), self._schedule.last_moved
                        self._report.draw(progress.step, active, trainable, last_moved)
                with self._clock("data"):
                    micro_batches = self._data.micro_batches()
                metrics, refreshes = self._train_step(micro_batches, started)
                progress.step += 1
                self._is_complete = True
                if metrics["trained_tokens_per_second"] and not progress.skipped_in_a_row:
                    self._prune_checkpoints()
                self._report.step(
                    {"step": progress.step, **metrics}, refreshes, is_logged=progress.is_due(cfg.log_every_n_steps)
                )
                self._profiler.step()
                is_due = progress.is_due(cfg.run_val_every_n_steps) and progress.step < num_steps
                if is_due and self._signalled() is None:
                    self._validate(f"step {progress.step}")
                self._save_and_leave_if_due()

    def _save_and_leave_if_due(self) -> None:
        progress, cfg = self._progress, self._cfg
        signalled = self._signalled()
        given_up = progress.skipped_in_a_row >= cfg.max_skipped_steps
        is_last = given_up or signalled is not None or progress.step == self._data.num_steps
        if is_last or progress.is_due(cfg.save_every_n_steps) or progress.is_due(self._data.steps_per_epoch):
            self.save_checkpoint()
            signalled = signalled or self._signalled()  # arrived during the save
        if given_up:
            raise DivergedError(
                f"{progress.skipped_in_a_row} steps in a row had a loss or gradient that is not finite; lower "
                "optimizer.lr, or set clip_grad_norm"
            )
        if signalled is not None:
            raise Stop(
                signalled,
                f"stopped after step {progress.step}, saved in {self._step_dir()}. To continue, {resume.HOW_TO_RESUME}",
            )

    def _save_whole_step(self) -> None:
        """Save after an error in a step, without what the step has accumulated."""
        self._optimizer.zero_grad()
        self.save_checkpoint()

    def _signalled(self) -> Signals | None:
        """The signal that this process or another one received, so that all stop after the same step."""
        number = self._world.largest(stop_request().signal or 0, self._device)
        return Signals(number) if number else None

    def _train_step(self, micro_batches: list[Batch], started: float) -> tuple[dict[str, float], list[Refresh]]:
        """One optimizer step; returns its metrics and refreshes. Its time counts from ``started``, before its draw."""
        ignore_index = self._loss_fn.ignore_index
        labels = [shift_labels(batch.pop("labels"), ignore_index) for batch in micro_batches]
        counts = [int((batch_labels != ignore_index).sum()) for batch_labels in labels]
        num_tokens = sum(batch["tokens"].numel() for batch in micro_batches)
        *num_trained, num_tokens = self._world.sums([*counts, num_tokens], self._device)
        loss = torch.zeros((), device=self._device)
        for batch, batch_labels, count, all_count in zip(micro_batches, labels, counts, num_trained, strict=True):
            if all_count == 0:
                continue  # no tokens to average over
            if count == 0:
                batch_labels[0, 0] = 0  # other processes wait for this one: a gradient times 0
            # The mean over all tokens of the step, independent of their split into micro-batches and processes.
            with self._clock("forward"):
                share = count / sum(num_trained)
                micro_loss = mean_loss(self._model, self._loss_fn, batch, batch_labels, self._device) * share
            with self._clock("backward"):
                micro_loss.backward()
            loss += micro_loss.detach()
        trained = self._layers.trained().values()
        sum_grads(trained, self._world)
        norm = clip_grad_norm_(trained, self._settings.clip_grad_norm, self._world)
        self._is_complete = False  # until the step is counted
        loss_value, grad_norm = torch.stack([self._world.sum_(loss), norm.to(loss)]).tolist()
        refreshes = self._update(loss_value, grad_norm, sum(num_trained))
        phases = self._clock.read()  # waits for the device, as `tolist` above
        seconds = time.perf_counter() - started
        metrics = {
            "loss": loss_value,
            "lr": float(get_lr(self._optimizer)),  # torchao has tensors
            "grad_norm": grad_norm,
            "skipped_steps": self._progress.skipped_steps,
            "step_seconds": seconds,
            **{f"{phase}_seconds": spent for phase, spent in phases.items()},
            "tokens_per_second": num_tokens / seconds,
            "trained_tokens_per_second": sum(num_trained) / seconds,
            **self._memory.metrics(),
            "optimizer_state_gb": (state_bytes(self._optimizer, self._device) + self._layers.nbytes()) / 1e9,
        }
        if self._lr_scheduler is not None:
            self._lr_scheduler.step()
        return metrics, refreshes

    def _update(self, loss: float, grad_norm: float, num_trained: int) -> list[Refresh]:
        """Step the optimizer if loss and gradient are finite; returns its basis refreshes."""
        progress, refreshes = self._progress, []
        if not num_trained:
            log.warning(f"Step {progress.step}: no tokens to train on; is tokenizer.max_seq_len too short?")
        elif math.isfinite(loss) and math.isfinite(grad_norm):
            with self._clock("optimizer"):
                self._optimizer.step()
            refreshes = self._schedule.refreshes
            progress.skipped_in_a_row = 0
            progress.trained_tokens += num_trained
        else:
            progress.skipped_steps += 1
            progress.skipped_in_a_row += 1
            places = bad_gradients(self._layers, self._world)
            log.warning(f"Step {progress.step}: loss {loss}, gradients not finite in {places}; no update.")
        self._optimizer.zero_grad(set_to_none=True)
        return refreshes

    def _validate(self, when: str) -> None:
        """Log the held-out loss, if there is held-out data."""
        if self._held_out is None:
            return
        rest = self._loss_fn, self._held_out, self._device, self._world
        with self._memory.paused():
            if self._quantized is not None and when in ("before", "after"):
                loss, num_tokens = full_precision_loss(self._model, self._layers, self._quantized, *rest)
            else:
                loss, num_tokens = held_out_loss(self._model, *rest)
        self._report.held_out_loss(when, self._progress.step, loss, num_tokens)
        if not math.isfinite(loss):
            self._write_manifest()
            raise DivergedError(f"the held-out loss, {when}, is {loss}: the run has diverged; lower optimizer.lr")

    def save_checkpoint(self) -> None:
        """Save ``step_N``: weights in Hugging Face's layout, and the state for an exact resume.

        Raises:
            CheckpointError: if it cannot be saved.
            DivergedError: if the weights are not finite. Every checkpoint has finite weights.
        """
        self._world.attempt(self._run.check_in_place, first_alone=True)
        with self._report.timed("save"):
            check_finite_weights(self._model, self._layers, self._progress.step, self._world)
            state = {name: owner.state_dict() for name, owner in self._stateful().items()}
            state |= {"identity": self._identity, "scores": asdict(self._scores)}
            writer = weight_writer(self._inputs, self._model, self._layers, self._quantized, self._world)
            save_checkpoint(self._step_dir(), self._run.run_id, *writer, state, self._world)
        self._has_unproven_checkpoint = True
        self._write_manifest()

    def _prune_checkpoints(self) -> None:
        """Remove old checkpoints, once a finite loss shows that the newest one is good."""
        if self._has_unproven_checkpoint:
            self._has_unproven_checkpoint = False
            self._world.attempt(lambda: self._run.steps.keep_last(self._cfg.keep_last_n), first_alone=True)

    def _finish(self) -> None:
        """Measure the final held-out loss, and write the last manifest, pictures and a summary."""
        self._report.close_draw(self._schedule.moved())
        if not self._progress.trained_tokens:
            raise RunError(
                "no token was trained in any step: every answer is cut off; raise tokenizer.max_seq_len, which is "
                f"{self._inputs.tokenizer.max_seq_len}, or shorten the prompts"
            )
        self._validate("after")
        if self._held_out is None and (skipped := self._progress.skipped_in_a_row):
            raise DivergedError(
                f"the run ended with {skipped} steps whose loss or gradient is not finite; lower optimizer.lr"
            )
        self._prune_checkpoints()
        self._write_manifest(finished=True)
        self._report.print_summary(self._step_dir())

    def _step_dir(self) -> Path:
        return self._run.steps.path(self._progress.step)

    def _write_manifest(self, *, finished: bool = False) -> None:
        self._report.write_manifest(self._progress, self._step_dir(), finished=finished)

    def cleanup(self) -> None:
        try:
            self._report.close()
        finally:
            self._run.release()


@parse
def recipe_main(cfg: DictConfig) -> None:
    """Fine-tune with OwLore; see `OwLoreFullFinetuneRecipe`."""
    settings = TrainingSettings.from_config(cfg)
    with process_group(settings.device, settings.cfg.dist_timeout_s, cpu_offload=settings.sharding(1).cpu_offload):
        recipe = OwLoreFullFinetuneRecipe(settings)
        try:
            recipe.setup()
            recipe.train()
        finally:
            recipe.cleanup()


if __name__ == "__main__":
    recipe_main()
