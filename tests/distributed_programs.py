"""Programs that tests start on several ranks, see `ranks.run_ranks`."""

import json
import time
from collections import Counter
from io import BytesIO
from pathlib import Path

import torch
import torch.distributed as dist
from families import group_on_cpu
from lm_eval.api.instance import Instance
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchao.optim import AdamW4bit, AdamW8bit
from torchao.optim.subclass_8bit import OptimState8bit
from torchtune.models.llama2 import llama2

import owlore_full_finetune
from owlore_evals.torchtune_lm import TorchtuneLM
from owlore_full_finetune import OwLoreFullFinetuneRecipe
from owlore_tune.checkpoints.training_state import OptimizerState
from owlore_tune.data.tokenizer import HFChatTokenizer
from owlore_tune.distributed.launch import current_world, process_group
from owlore_tune.distributed.world import local
from owlore_tune.layers.grouped import group_experts
from owlore_tune.optim.bases import sketch, truncate
from owlore_tune.optim.moments import state_bytes
from owlore_tune.optim.weights import ProjectedWeight
from owlore_tune.quantized.store import BackgroundStore, LayerStore
from owlore_tune.training import components
from owlore_tune.training import load_weights as run_weights
from owlore_tune.training.config import TrainingSettings


class SlowStore(BackgroundStore):
    """The store of a GPU. Its files are not complete when other ranks need them."""

    def _write(self, file: Path, weights: dict[str, torch.Tensor]) -> None:
        time.sleep(0.5)
        super()._write(file, weights)


def train(*files: str) -> None:
    """Train recipes, one after the other.

    Those in a directory named ``…_background`` have the store of a GPU, and those in ``…_grouped`` its experts.
    """
    configs = [DictConfig(OmegaConf.load(file)) for file in files]
    offloads = any(cfg.get("fsdp_cpu_offload") and cfg.device != "cpu" for cfg in configs)
    with process_group(torch.device(configs[0].device), configs[0].get("dist_timeout_s", 600), cpu_offload=offloads):
        for cfg in configs:
            run_weights.LayerStore = SlowStore if cfg.output_dir.endswith("_background") else LayerStore
            components.group_experts = group_on_cpu if cfg.output_dir.endswith("_grouped") else group_experts
            finetune(cfg)


def finetune(cfg: DictConfig, recipe_class=OwLoreFullFinetuneRecipe) -> None:
    recipe = recipe_class(TrainingSettings.from_config(cfg))
    recipe.setup()
    recipe.train()
    recipe.cleanup()


def sent_bytes(parameter: torch.Tensor) -> int:
    """Return the bytes in which a step sends a parameter's gradient, apart from FSDP2."""
    return 0 if isinstance(parameter, DTensor) else parameter.nbytes


class SentBytes(TorchDispatchMode):
    """Counts bytes of the tensors passed to each collective."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if name.startswith("c10d."):
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            self.counts[name.split(".")[1]] += sum(tensor.nbytes for tensor in tensors)
        return func(*args, **(kwargs or {}))


def count(output: str, file: str) -> None:
    """Write the bytes per collective and the size of this rank's optimizer state for each step."""
    records = []

    class Counting(OwLoreFullFinetuneRecipe):
        def _train_step(self, micro_batches, started):
            with SentBytes() as sent:
                outcome = super()._train_step(micro_batches, started)
            record = {"sent": sent.counts, "state_bytes": state_bytes(self.optimizer) + self.layers.nbytes()}
            record["trained_bytes"] = sum(map(sent_bytes, self.layers.trained().values()))
            record["weights"] = [local(parameter).double().sum().item() for parameter in self.model.parameters()]
            records.append(record)
            return outcome

    cfg = DictConfig(OmegaConf.load(file))
    # torchao's optimizers compile themselves.
    with process_group(torch.device(cfg.device), 600), torch.compiler.set_stance("force_eager"):
        finetune(cfg, Counting)
        Path(output).with_suffix(f".{dist.get_rank()}.json").write_text(json.dumps(records))


def poison(file: str) -> None:
    """Train with non-finite gradients at step 4, only on the last rank."""
    cfg = DictConfig(OmegaConf.load(file))
    with process_group(torch.device(cfg.device), 600):
        recipe = OwLoreFullFinetuneRecipe(TrainingSettings.from_config(cfg))
        recipe.setup()
        summed = owlore_full_finetune.sum_grads

        def poisoned(trained, world) -> None:
            if recipe.progress.step == 4 and dist.get_rank() == dist.get_world_size() - 1:
                for parameter in trained:
                    local(parameter.grad).fill_(float("nan"))
            summed(trained, world)

        owlore_full_finetune.sum_grads = poisoned
        recipe.train()
        recipe.cleanup()


def fail_alone() -> None:
    """Make a basis with an eigenvalue algorithm that does not converge on the last rank."""
    with process_group(torch.device("cpu"), 600):
        world = current_world()
        if world.rank == 1:

            def fail(gram: torch.Tensor) -> None:
                raise torch.linalg.LinAlgError("no convergence")

            torch.linalg.eigh = fail
        generator = torch.Generator().manual_seed(world.rank)
        left, right = (torch.randn(20, size, generator=generator) for size in (16, 12))
        generator = torch.Generator().manual_seed(0)
        basis = next(truncate([sketch(left, right, 4, generator=generator, world=world)], 4, world))
        ours, first = world.gather((basis.columns, basis.is_given.item()))
        assert torch.equal(ours[0], first[0]) and ours[1] is first[1] is True, (ours, first)


def turn_alone() -> None:
    """Make a basis with an SVD that has other signs on the last rank."""
    with process_group(torch.device("cpu"), 600):
        world = current_world()
        if world.rank == 1:
            svd = torch.linalg.svd
            torch.linalg.svd = lambda *args, **kwargs: [-part for part in svd(*args, **kwargs)]
        torch.manual_seed(0)
        linear = nn.Linear(12, 16, bias=False)
        weight = ProjectedWeight(linear, 4, generator=lambda device: None, basis="svd", world=world)
        weight.engage()
        linear(torch.randn(20, 12)).square().sum().backward()
        ours, first = world.gather((weight.basis, weight.is_given.item()))
        assert torch.equal(ours[0], first[0]) and ours[1] is first[1] is True, (ours, first)


def save_8_bits() -> None:
    """Save and load moments in few bits of a matrix that FSDP2 shards: of all ranks, of one, and of an empty shard.

    The same number of ranks goes on as before. A single process gets the same values.
    """
    cases = ((AdamW8bit, 49, 512), (AdamW8bit, 3, 2048), (AdamW8bit, 1, 8192), (AdamW4bit, 48, 512))
    with process_group(torch.device("cpu"), 600), torch.compiler.set_stance("force_eager"):
        world = current_world()
        for kind, rows, columns in (*cases, (AdamW8bit, 20, 300)):
            torch.manual_seed(0)
            linear, alone = (nn.Linear(columns, rows, bias=False) for _ in range(2))
            fully_shard(linear, mesh=DeviceMesh.from_group(dist.group.WORLD, "cpu"))
            first, second = (kind(linear.parameters(), lr=1e-3) for _ in range(2))
            linear(torch.randn(8, columns)).square().sum().backward()
            first.step()
            torch.save(OptimizerState(first, world).state_dict(), file := BytesIO())
            saved = torch.load(BytesIO(world.share(file.getvalue())))
            OptimizerState(second, world).load_state_dict(saved)
            whole = kind(alone.parameters(), lr=1e-3)
            OptimizerState(whole).load_state_dict(saved)
            for key in ("exp_avg", "exp_avg_sq"):
                ours, theirs = (local(optimizer.state[linear.weight][key]) for optimizer in (first, second))
                start = sum(world.gather(len(ours))[: world.rank])
                assert type(ours) is type(theirs), (type(ours), type(theirs))
                assert torch.equal(plain(ours), plain(theirs)) and (plain(ours).any() or not len(ours))
                joined = plain(whole.state[alone.weight][key])
                assert joined.shape == (rows, columns)
                assert torch.equal(plain(ours), joined[start : start + len(ours)])
                in_8_bits = all(world.gather(isinstance(ours, OptimState8bit) or not len(ours)))
                assert isinstance(whole.state[alone.weight][key], OptimState8bit) is in_8_bits


def plain(value: torch.Tensor) -> torch.Tensor:
    return value.dequantize() if hasattr(value, "__tensor_flatten__") else value.float()


def serve(tokenizer: str, rank: str, failure: str, output: str) -> None:
    """Generate on all ranks, of which ``rank`` fails, or has memory for one row. Write the answers to ``output``."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = llama2(300, 4, 4, 2, 32, max_seq_len=256, intermediate_dim=48)
    lm = TorchtuneLM(model, HFChatTokenizer(tokenizer), batch_size=2)

    def fail(module, args) -> None:
        if failure == "broken":
            raise RuntimeError("broken on purpose")
        if len(args[0]) > 1:
            raise torch.OutOfMemoryError("no more")

    if dist.get_rank() == int(rank):
        lm.model.tok_embeddings.register_forward_pre_hook(fail)
    if dist.get_rank() == 0:
        options = {"max_gen_toks": 5, "until": []}
        requests = [Instance("generate_until", {}, (f"question {i}", options), i) for i in range(9)]
        Path(output).write_text(json.dumps(lm.generate_until(requests)))
        lm.dismiss()
    else:
        lm.serve()
