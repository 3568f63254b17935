"""The training recipe, which also times the forward and required backward pass, alternately before and after a step."""

import time

import torch
from omegaconf import DictConfig

from owlore_full_finetune import OwLoreFullFinetuneRecipe
from owlore_tune.data.loader import Batch
from owlore_tune.loss import mean_loss, shift_labels
from owlore_tune.optim.adamw import Refresh
from owlore_tune.program import parse
from owlore_tune.run.settings import TrainingSettings


class FloorRecipe(OwLoreFullFinetuneRecipe):
    """Adds ``floor_seconds`` to the recipe's metrics."""

    def _train_step(self, micro_batches: list[Batch], started: float) -> tuple[dict[str, float], list[Refresh]]:
        (batch,) = map(dict, micro_batches)  # copy: the step removes the labels
        before = self._progress.step % 2 == 0
        seconds = self._floor(batch) if before else 0.0
        metrics, refreshes = super()._train_step(micro_batches, started + seconds)
        return metrics | {"floor_seconds": seconds if before else self._floor(batch)}, refreshes

    def _floor(self, batch: Batch) -> float:
        """Seconds of a forward pass, plus a backward pass that only computes the gradients of active weights."""
        self._synchronize()
        started = time.perf_counter()
        labels = shift_labels(batch.pop("labels"), self._loss_fn.ignore_index)
        active = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        loss = mean_loss(self._model, self._loss_fn, batch, labels, self._device)
        torch.autograd.grad(loss, active)  # runs no hooks and stores no gradients
        self._synchronize()
        return time.perf_counter() - started

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


@parse
def recipe_main(cfg: DictConfig) -> None:
    recipe = FloorRecipe(TrainingSettings.from_config(cfg))
    recipe.setup()
    recipe.train()
    recipe.cleanup()


if __name__ == "__main__":
    recipe_main()
