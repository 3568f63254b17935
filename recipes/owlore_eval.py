"""Evaluate a torchtune model on lm-evaluation-harness tasks, local files and MT-Bench, without conversion.

tune run [--nproc_per_node N] owlore_eval --config eval/mmlu checkpointer.checkpoint_dir=DIR [field=value ...]
"""

import copy
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torchtune import training
from torchtune.recipe_interfaces import EvalRecipeInterface

from owlore_evals.results import check_output_dir, print_results, save_results
from owlore_evals.suite import EvalConfig, Suite, build_lm, check_suite
from owlore_tune.checkpoints.hf_weights import HFCheckpointer
from owlore_tune.cli import parse
from owlore_tune.config.components import build, check_config, device_and_dtype, plain
from owlore_tune.config.schema import defaults, required
from owlore_tune.data.tokenizer import HFChatTokenizer, check_vocabulary
from owlore_tune.distributed.launch import join_process_group, let_gloo_finish
from owlore_tune.errors import ConfigError
from owlore_tune.files import user_path
from owlore_tune.measure import MANIFEST, machine, peak_memory_bytes, versions
from owlore_tune.models.decoder import find_layers
from owlore_tune.models.fused import fuse_parts
from owlore_tune.training.output_dir import RunDirectory, writable_directory
from owlore_tune.training.signals import stop_request

OUTPUT_FILES = (MANIFEST, "answers.jsonl", "judgments.jsonl", "mt_bench.png")
REQUIRED, DEFAULTS = required(EvalConfig), defaults(EvalConfig)


class OwLoreEvalRecipe(EvalRecipeInterface):
    """Runs lm-evaluation-harness on a torchtune model, on one device or, under torchrun, on several.

    Each rank has the whole model and processes its share. Only rank 0 drives the harness and writes the results.
    Invalid settings and missing documents are reported before weights are loaded.

    Args:
        cfg: the parsed config, with the fields of `EvalConfig`.

    Attributes:
        lm, suite: the harness's model and the tasks, after `setup`. Only rank 0 has tasks.

    Raises:
        ConfigError: if a key is unknown or a value is invalid.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self._cfg = cfg = check_config(_of_its_builder(cfg), REQUIRED, DEFAULTS)
        check_suite(cfg)
        self._device, self._dtype = device_and_dtype(cfg)
        self._output_dir = Path(cfg.output_dir).absolute()
        self._run_dir = RunDirectory(self._output_dir, "evaluation")
        self._is_rank_zero = not dist.is_initialized() or dist.get_rank() == 0

    def validate(self) -> str:
        """Check the config, and the model if it is known without weights. Returns a description of the model."""
        path = self._cfg.model.get("path")
        if path is not None and not user_path(path).is_dir():
            return f"model.path={path} does not exist, so the model is not checked"
        model = self._setup_model()
        return f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters"

    def setup(self) -> None:
        cfg = self._cfg
        writable_directory(cfg.output_dir)
        if self._is_rank_zero:
            self._run_dir.claim()
            self._run_dir.check_free(OUTPUT_FILES)
        tokenizer = build("tokenizer", cfg.tokenizer, kind=HFChatTokenizer)
        checkpointer = build("checkpointer", cfg.checkpointer, kind=HFCheckpointer)
        self._fingerprint, self._model_config = checkpointer.fingerprint(), checkpointer.config
        check_output_dir(self._output_dir, self._fingerprint)
        model = self._setup_model()
        checkpointer.check_model(model)
        check_vocabulary(tokenizer, model)
        if self._is_rank_zero:
            self.suite = Suite(cfg, tokenizer, model.max_seq_len)
        self._load_weights(model, checkpointer)
        if self._is_rank_zero:
            self._run_dir.start()
        self.lm = build_lm(cfg, model, tokenizer)

    def _setup_model(self) -> torch.nn.Module:
        with training.set_default_dtype(self._dtype), torch.device("meta"):
            model = build("model", self._cfg.model)
        try:
            find_layers(model)
        except TypeError as error:
            raise ConfigError(str(error)) from error
        fuse_parts(model, self._device)
        return model

    def _load_weights(self, model: torch.nn.Module, checkpointer: HFCheckpointer) -> None:
        checkpointer.load_checkpoint(model, dtype=self._dtype, device=self._device)

    def evaluate(self) -> None:
        if not self._is_rank_zero:
            self.lm.serve()
            return
        started = time.perf_counter()
        model = (self.lm, self._model_id(), self._output_dir)
        self.suite.check_saved(*model[1:])
        results = self.suite.run_tasks(*model)
        try:
            for key, values in self.suite.run_mt_bench(*model).items():
                results[key] = {**results.get(key, {}), **values}
            self.lm.dismiss()
        finally:
            if results.get("results"):  # without a judge's ratings, the other results are still saved
                self._save(results, time.perf_counter() - started)

    def _save(self, results: dict[str, Any], seconds: float) -> None:
        manifest = self._manifest(seconds)
        print_results(results)  # first, so that results that cannot be written are not lost
        with stop_request().deferred():
            file = save_results(
                self._output_dir,
                results,
                manifest,
                run_id=self._run_dir.run_id,
                model=str(self._cfg.checkpointer.checkpoint_dir),
                chat_template=self.lm.chat_template(self.suite.apply_chat_template),
                fewshot_as_multiturn=self._cfg.fewshot_as_multiturn,
            )
        print(f"results         {file}")

    def cleanup(self) -> None:
        self._run_dir.release()

    def _model_id(self) -> str:
        """Return the fingerprint of the weights and of all settings that affect an answer."""
        info = self.lm.get_model_info()
        names = ("model_dtype", "prefix", "max_length", "generation_seed", "generation_config", "tokenizer_sha")
        settings = [info[name] for name in names] + [self._model_config]
        model = OmegaConf.to_container(self._cfg.model, resolve=True)
        assert isinstance(model, dict)
        settings += [model | {"path": None}, self._cfg.checkpointer.model_type]  # a directory may be moved
        return f"{self._fingerprint}-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]}"

    def _manifest(self, seconds: float) -> dict[str, Any]:
        return {
            "versions": versions(),
            "machine": machine(self._device),
            "config": plain(self._cfg),
            "checkpoint": str(self._cfg.checkpointer.checkpoint_dir),
            "fingerprint": self._fingerprint,
            "model": self.lm.get_model_info(),
            "apply_chat_template": self.suite.apply_chat_template,
            "seconds": seconds,
            "peak_memory_bytes": peak_memory_bytes(self._device),
        }


def _of_its_builder(cfg: DictConfig) -> DictConfig:
    """``cfg`` without ``model.path`` of the default model, which ``model=BUILDER`` on a command line leaves there."""
    model = cfg.get("model")
    if not isinstance(model, DictConfig) or str(model.get("_component_")).endswith("hf_decoder"):
        return cfg
    if OmegaConf.is_interpolation(model, "path"):
        cfg = copy.deepcopy(cfg)
        del cfg.model.path
    return cfg


@parse
def recipe_main(cfg: DictConfig) -> None:
    """Evaluate a model; see `OwLoreEvalRecipe`."""
    if training.is_distributed():
        join_process_group("gloo")  # ranks exchange only Python objects
    recipe = OwLoreEvalRecipe(cfg=cfg)
    try:
        recipe.setup()
        recipe.evaluate()
    finally:
        recipe.cleanup()
    # Not after an error: the failed rank exits, and torchrun then stops the ranks that wait for it.
    if dist.is_initialized():
        dist.destroy_process_group()
        let_gloo_finish()


if __name__ == "__main__":
    recipe_main()
