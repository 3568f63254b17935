"""Fine-tune all weights of a model, a few layers at a time (OwLore, arXiv 2405.18380), on one device or several.

tune run owlore_full_finetune --config smollm2/135M_owlore [field=value ...]
tune run --nproc_per_node 2 owlore_full_finetune --config llama2/7B_owlore [field=value ...]
"""

import math
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from signal import Signals
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import Tensor
from torchtune import training, utils
from torchtune.recipe_interfaces import FTRecipeInterface
from torchtune.training.lr_schedulers import get_lr

from owlore_tune.checkpoints.training_state import OptimizerState, RngState, load_parts, load_state, save_checkpoint
from owlore_tune.cli import parse
from owlore_tune.distributed.fsdp import clip_grad_norm_, sum_grads
from owlore_tune.distributed.launch import current_world, process_group
from owlore_tune.loss import mean_loss, shift_labels
from owlore_tune.measure import Clock, PeakMemory, reuse_freed_memory
from owlore_tune.training import components, load_weights, resume, validation
from owlore_tune.training.config import TrainingSettings
from owlore_tune.training.output_dir import RunDirectory, shared_directory
from owlore_tune.training.plan import checked_plan
from owlore_tune.training.report import Progress, Report, measured_bytes, state_gb
from owlore_tune.training.signals import Stop, stop_request

log = utils.get_logger("INFO")


class OwLoreFullFinetuneRecipe(FTRecipeInterface):
    """OwLore on one device, or under torchrun on several, with weights that FSDP2 shards or that every device has.

    `setup` checks everything that can be checked before weights load. Then it loads the weights, scores the layers and
    sets up the schedule of active layers. `train` draws new layers from that schedule every K steps. Full fine-tuning,
    LISA and GaLore are settings of the ``owlore`` block; see configs/smollm2.

    With ``resume_from_checkpoint=true``, an interrupted run continues, on the same number of CPU ranks bit for bit.

    Args:
        settings: of the run; see `owlore_tune.training.config` for the fields of its config.

    Attributes:
        run, report, progress: the run's directory, its records, and its counters.
        inputs, plan, loss_fn, model, layers, optimizer, quantized, scores, schedule: its parts, after `setup`.

    Raises:
        ConfigError: if a setting does not go with the number of processes.
    """

    def __init__(self, settings: TrainingSettings) -> None:
        self.settings, self._cfg, self._device = settings, settings.cfg, settings.device
        self._world = current_world()
        is_sharded = dist.is_initialized() and settings.shards()
        settings.check_launch(sharded=is_sharded)
        self._sharding = settings.sharding(self._world.size) if is_sharded else None
        self.run = RunDirectory(settings.output_dir, "training")
        self.report = Report(settings.output_dir, self._world)
        self.progress = Progress()
        self._clock = Clock(self._device)
        self._has_unproven_checkpoint = False
        training.set_seed(seed=settings.cfg.seed)
        reuse_freed_memory(self._device)
        self._memory = PeakMemory(self._device)

    def setup(self) -> None:
        settings, cfg, world = self.settings, self._cfg, self._world
        shared_directory(cfg.output_dir, world)
        settings.check_log_directories()
        components.check_metric_logger(settings)
        checkpoint = resume.find_checkpoint(self.run, cfg.resume_from_checkpoint, world)
        saved = load_state(checkpoint) if checkpoint else None
        self.inputs, self._identity = resume.matching_inputs(settings, saved, checkpoint, world)
        self.loss_fn, self.model, self.layers, self.optimizer = self._setup_model()
        self._lr_scheduler = components.build_lr_scheduler(settings, self.optimizer, self.inputs.data.num_steps)
        settings.warn_if_short(self.inputs.data.num_steps, len(self.layers.layers))
        self._profiler = components.build_profiler(settings)
        self.quantized, self.scores = self.load_checkpoint(checkpoint, saved)
        self.layers.quantized = self.quantized
        self.schedule = components.build_schedule(settings, self.layers, self.optimizer, self.scores.scores)
        self.loss_fn = components.finish_model(settings, self.loss_fn, self.model, self.layers, self._sharding)
        if saved is not None and checkpoint is not None:
            load_parts(self._stateful(), saved, checkpoint)
            log.info(f"Resumed from {checkpoint}, step {self.progress.step}.")
            self.inputs.data.seek(self.progress.step)
            self._has_unproven_checkpoint = True  # the one that it resumes from
            world.call(lambda: self.run.steps.set_aside_after(self.progress.step), on_rank_zero=True)
        self._start_run()

    def _setup_model(self) -> components.TrainedModel:
        """Build everything that needs no weights, and check its memory plan against the limit."""
        settings, world = self.settings, self._world
        trained = components.build_trained_model(settings, world)
        components.check_model(self.inputs, trained.model)
        self.plan = checked_plan(settings, self.inputs, trained, self._sharding)
        return components.prepare(settings, trained, self._sharding, world)

    def load_checkpoint(self, checkpoint: Path | None, saved: dict[str, Any] | None) -> tuple[Any, Any]:
        """Load the weights, from the checkpoint to resume from if there is one, and score the layers.

        Returns:
            The quantized layers, None if the weights are in full precision; and the scores.
        """
        settings, inputs, model, world = self.settings, self.inputs, self.model, self._world
        fingerprint = self._identity["digests"][resume.BASE_WEIGHTS]
        scores = load_weights.known_scores(settings, fingerprint, len(self.layers.layers), saved and saved["scores"])
        quantized, values = None, None
        with self.report.timed("load"):
            if settings.owlore.weights == "full":
                load_weights.load_full(settings, inputs, model, checkpoint, self._sharding)
            else:
                store = self.run.path / load_weights.STORE / self.run.run_id
                quantized = load_weights.open_quantized(settings, inputs, model, checkpoint, store, world)
                values = load_weights.load_quantized(quantized, settings, inputs, model, world, scores=scores is None)
        with self.report.timed("score"):
            scores = scores or load_weights.score_layers(settings, model, inputs.data, fingerprint, world, values)
        return quantized, scores

    def _stateful(self) -> dict[str, Any]:
        """What has state in a checkpoint. The optimizer's state depends on the schedule before it."""
        owners = {
            "progress": self.progress,
            "schedule": self.schedule,
            "optimizer": OptimizerState(self.optimizer, self._world),
            "lr_scheduler": self._lr_scheduler,
            "records": self.report.records,
            "rng": RngState(self._world),
        }
        return {name: owner for name, owner in owners.items() if owner is not None}

    def _start_run(self) -> None:
        """Mark the directory as this run's, then write its first files."""
        call = partial(self._world.call, on_rank_zero=True)
        if self.quantized is not None:
            call(self.quantized.store.check_space)
        call(self.run.start)
        if self.quantized is not None:
            self.quantized.fill_store()
        measure = partial(measured_bytes, self.model, self.layers, self.optimizer, self._memory, self._device)
        of_run = self.run.run_id, self.progress.step, self.plan, self.scores, self.schedule.sampler
        call(lambda: self.report.start(self.settings, *of_run, measure))
        call(lambda: self.report.write_manifest(self.progress, self._step_dir()))

    def train(self) -> None:
        try:
            self._validate_if_due()
            self._memory.start()
            with stop_request().deferred(), self._profiler:  # a signal takes effect after a step and its checkpoint
                self._train_loop()
            self._finish()
        except Exception as error:
            resume.raise_with_advice(error, self.run)
            raise

    def _train_loop(self) -> None:
        """Train to the last step.

        Raises:
            Stop: after the step in which a signal arrived, once that step is saved.
            DivergedError: after ``max_skipped_steps`` skipped steps in a row.
        """
        progress, num_steps = self.progress, self.inputs.data.num_steps
        with self.report.progress_bar(progress, num_steps):
            while progress.step < num_steps:
                started = time.perf_counter()
                with self._clock("redraw"):
                    if (active := self.schedule.begin_step()) is not None:
                        self.report.draw(progress.step, active, self.layers.num_trainable(), self.schedule.last_moved)
                with self._clock("data"):
                    micro_batches = self.inputs.data.micro_batches()
                metrics = self._train_step(micro_batches, started)
                progress.step += 1
                if metrics["trained_tokens_per_second"] and not progress.skipped_in_a_row:
                    self._prune_checkpoints()
                self.report.step(progress, metrics)
                self._profiler.step()
                self._validate_if_due()
                self._save_and_leave_if_due()

    def _save_and_leave_if_due(self) -> None:
        progress, cfg = self.progress, self._cfg
        signalled = self._signalled()
        is_last = progress.skipped_in_a_row >= cfg.max_skipped_steps or progress.step == self.inputs.data.num_steps
        every = (cfg.save_every_n_steps, self.inputs.data.steps_per_epoch)
        if is_last or signalled is not None or any(map(progress.is_due, every)):
            self.save_checkpoint()
            signalled = signalled or self._signalled()  # arrived during the save
        validation.check_skipped_steps(progress, cfg.max_skipped_steps)
        if signalled is not None:
            where = f"stopped after step {progress.step}, saved in {self._step_dir()}"
            raise Stop(signalled, f"{where}. To continue, {resume.HOW_TO_RESUME}")

    def _signalled(self) -> Signals | None:
        """The signal that this process or another one received, so that all stop after the same step."""
        number = self._world.largest(stop_request().signal or 0)
        return Signals(number) if number else None

    def _train_step(self, micro_batches: list[dict[str, Tensor]], started: float) -> dict[str, float]:
        """One optimizer step; returns its metrics. Its time counts from ``started``, before its draw."""
        ignore_index = self.loss_fn.ignore_index
        labels = [shift_labels(batch.pop("labels"), ignore_index) for batch in micro_batches]
        counts = [int((batch_labels != ignore_index).sum()) for batch_labels in labels]
        *num_trained, num_tokens = self._world.sums([*counts, sum(each.numel() for each in labels)])
        loss = torch.zeros((), device=self._device)
        for batch, batch_labels, count, all_count in zip(micro_batches, labels, counts, num_trained, strict=True):
            if all_count == 0:
                continue  # no tokens to average over
            if count == 0:
                batch_labels[0, 0] = 0  # other processes wait for this one: a gradient times 0
            # The mean over all tokens of the step, independent of their split into micro-batches and processes.
            with self._clock("forward"):
                micro_loss = mean_loss(self.model, self.loss_fn, batch, batch_labels, self._device)
                micro_loss = micro_loss * (count / sum(num_trained))
            with self._clock("backward"):
                micro_loss.backward()
            loss += micro_loss.detach()
        trained = self.layers.trained().values()
        sum_grads(trained, self._world)
        norm = clip_grad_norm_(trained, self.settings.clip_grad_norm, self._world)
        values = torch.stack([self._world.sum_(loss), norm.to(loss)])
        self.inputs.data.read_ahead(self._device)
        loss_value, grad_norm = values.tolist()  # waits for the device
        self._update(loss_value, grad_norm, sum(num_trained))
        phases, seconds = self._clock.read(), time.perf_counter() - started  # on a GPU, the last step's update
        metrics = {
            "loss": loss_value if sum(num_trained) else math.nan,
            "lr": float(get_lr(self.optimizer)),  # torchao has tensors
            "grad_norm": grad_norm,
            "skipped_steps": self.progress.skipped_steps,
            "step_seconds": seconds,
            **{f"{phase}_seconds": spent for phase, spent in phases.items()},
            "refresh_seconds": self.schedule.refresh_seconds,
            "tokens_per_second": num_tokens / seconds,
            "trained_tokens_per_second": sum(num_trained) / seconds,
            **self._memory.metrics(),
            "optimizer_state_gb": state_gb(self.optimizer, self.layers, self._device),
        }
        if self._lr_scheduler is not None:
            self._lr_scheduler.step()
        return metrics

    def _update(self, loss: float, grad_norm: float, num_trained: int) -> None:
        """Step the optimizer if loss and gradient are finite."""
        progress = self.progress
        if not num_trained:
            log.warning(f"Step {progress.step}: no tokens to train on; is tokenizer.max_seq_len too short?")
        elif math.isfinite(loss) and math.isfinite(grad_norm):
            with self._clock("optimizer"):
                self.optimizer.step()  # hooks of the schedule accept new bases before it, and count it after it
            progress.skipped_in_a_row = 0
            progress.trained_tokens += num_trained
        else:
            progress.skipped_steps += 1
            progress.skipped_in_a_row += 1
            places = validation.bad_gradients(self.layers, self._world)
            log.warning(f"Step {progress.step}: loss {loss}, gradients not finite in {places}; no update.")
        self.schedule.end_step()

    def _validate_if_due(self) -> None:
        """After a step, and before the first one. A resumed run makes up for what a signal has left out."""
        due = self.progress.validation_due(self._cfg.run_val_every_n_steps, self.inputs.data.num_steps)
        if due is not None and due not in self.report.records.losses and self._signalled() is None:
            self.validate(due, exact=due == "before")

    def validate(self, when: str, *, exact: bool = False) -> None:
        """Log the held-out loss, if there is held-out data; if ``exact``, that of the weights in full precision."""
        if (data := self.inputs.held_out) is None:
            return
        rest = self.quantized if exact else None, self.loss_fn, data, self._device, self._world
        with self._memory.paused():
            loss, num_tokens = validation.held_out_loss_of(self.model, self.layers, *rest)
        self.report.held_out_loss(when, self.progress.step, loss, num_tokens)
        if not math.isfinite(loss):
            self.report.write_manifest(self.progress, self._step_dir())
        validation.check_held_out_loss(when, loss)

    def save_checkpoint(self) -> None:
        """Save ``step_N``: weights in Hugging Face's layout, and the state for an exact resume.

        Raises:
            CheckpointError: if it cannot be saved.
            DivergedError: if the weights are not finite. Every checkpoint has finite weights.
        """
        with self.report.timed("save"):
            validation.check_finite_weights(self.model, self.layers, self.progress.step, self._world)
            state = {name: part.state_dict() for name, part in self._stateful().items()}
            state |= {"identity": self._identity, "scores": asdict(self.scores)}
            writer = load_weights.weight_writer(self.inputs, self.model, self.layers, self.quantized, self._world)
            save_checkpoint(self._step_dir(), self.run.run_id, *writer, state, self._world)
        self._has_unproven_checkpoint = True
        self.report.write_manifest(self.progress, self._step_dir())

    def _prune_checkpoints(self) -> None:
        """Remove old checkpoints, once a finite loss shows that the newest one is good."""
        if self._has_unproven_checkpoint:
            self._has_unproven_checkpoint = False
            self._world.call(lambda: self.run.steps.keep_last(self._cfg.keep_last_n), on_rank_zero=True)

    def _finish(self) -> None:
        """Measure the final held-out loss, and write the last manifest, pictures and a summary."""
        self.report.close_draw(self.progress.step, self.schedule.moved())
        validation.check_trained(self.progress, self.inputs)
        self.validate("after", exact=True)
        self._prune_checkpoints()
        self.report.write_manifest(self.progress, self._step_dir(), finished=True)
        self.report.print_summary(self._step_dir())

    def _step_dir(self) -> Path:
        return self.run.steps.path(self.progress.step)

    def cleanup(self) -> None:
        try:
            self.report.close()
        finally:
            self.run.release()


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
