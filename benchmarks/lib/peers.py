"""A plain training loop on the transformers model, with the published optimizers of other methods.

    python benchmarks/lib/peers.py galore|badam --model DIR --output steps.jsonl [--data FILE --lr LR ...]

galore is `galore-torch`'s AdamW and badam is `badam`'s BlockOptimizer, both from PyPI. The data, its
order and the step log are the same as in the other benchmarks.
"""

import argparse
import importlib
import importlib.util
import random
import sys
import types

import torch
from step_logger import StepLogger
from torch.utils.data import DataLoader
from torchtune.data import padded_collate_packed
from torchtune.training.lr_schedulers import get_cosine_schedule_with_warmup
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from owlore_tune.data.datasets import instruction_dataset, mmlu_dev_dataset
from owlore_tune.data.tokenizer import HFChatTokenizer


def galore_optimizer(model: torch.nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    """The Linears of the layers are projected, with GaLore's scale for fine-tuning; other weights have full rank."""
    package = types.ModuleType("galore_torch")  # the package's __init__ imports bitsandbytes, which needs a GPU
    package.__path__ = importlib.util.find_spec("galore_torch").submodule_search_locations
    sys.modules["galore_torch"] = package
    adamw = importlib.import_module("galore_torch.adamw").AdamW
    projected = [p for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not q for q in projected)]
    group = {"params": projected, "rank": 128, "update_proj_gap": args.resample_every, "scale": 4, "proj_type": "std"}
    return adamw([{"params": others}, group], lr=args.lr or 1e-4, no_deprecation_warning=True)


def badam_optimizer(model: torch.nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    from badam import BlockOptimizer

    return BlockOptimizer(
        base_optimizer=torch.optim.AdamW(model.parameters(), lr=args.lr or 1e-5, weight_decay=0, fused=True),
        named_parameters_list=list(model.named_parameters()),
        switch_block_every=args.resample_every,
        switch_mode="ascending" if args.middle_blocks else "random",
        start_block=model.config.num_hidden_layers // 2 - 1 if args.middle_blocks else None,
        verbose=0,
    )


OPTIMIZERS = {"galore": galore_optimizer, "badam": badam_optimizer}


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all state tensors, including projectors and BAdam's float32 copies of a block's weights."""
    total = sum(weight.nbytes for weight in getattr(optimizer, "param_idx2hp", {}).values())
    optimizer = getattr(optimizer, "base_optimizer", optimizer)  # BAdam's inner optimizer
    for state in optimizer.state.values():
        for value in state.values():
            value = getattr(value, "ortho_matrix", value)
            total += value.nbytes if torch.is_tensor(value) else 0
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=OPTIMIZERS)
    parser.add_argument("--model", required=True, help="model directory")
    parser.add_argument("--output", required=True, help="file for the step log")
    parser.add_argument("--steps", type=int, default=22)
    parser.add_argument("--resample-every", type=int, default=10, help="steps between draws or basis refreshes")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing")
    parser.add_argument("--lr", type=float, help="learning rate (default: the method's)")
    parser.add_argument("--warmup", type=int, help="warmup steps of a cosine schedule (default: constant lr)")
    parser.add_argument("--clip", type=float, help="maximum gradient norm")
    parser.add_argument("--data", help="instruction data, used in order (default: MMLU dev)")
    parser.add_argument("--middle-blocks", action="store_true", help="badam: begin in the middle, for a typical time")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--save", help="directory for the trained model")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device).train()
    if args.checkpointing:
        model.gradient_checkpointing_enable()
    tokenizer = HFChatTokenizer(args.model, args.seq_len)
    if args.data:
        dataset = instruction_dataset(tokenizer, data_files=args.data, packed=True)
    else:
        dataset = mmlu_dev_dataset(tokenizer, packed=True)
    shuffle = not args.data
    loader = DataLoader(dataset, args.batch_size, shuffle, drop_last=True, collate_fn=padded_collate_packed)
    batches = [batch for _ in range(-(-args.steps // len(loader))) for batch in loader][: args.steps]
    optimizer = OPTIMIZERS[args.method](model, args)
    scheduler = None
    if args.warmup is not None:
        scheduler = get_cosine_schedule_with_warmup(optimizer, args.warmup, args.steps)
    logger = StepLogger(args.output)
    for step, batch in enumerate(tqdm(batches, unit="step"), start=1):
        tokens, positions, labels = (batch[key].to(device) for key in ("tokens", "input_pos", "labels"))
        # With a cache, tokens of a packed row attend to the samples before theirs.
        loss = model(input_ids=tokens, position_ids=positions, labels=labels, use_cache=False).loss
        loss.backward()
        if args.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()
        logger.log_dict({"loss": loss.item(), "optimizer_state_gb": state_bytes(optimizer) / 1e9}, step)
    logger.close()
    if args.save:
        model.save_pretrained(args.save)


if __name__ == "__main__":
    main()
