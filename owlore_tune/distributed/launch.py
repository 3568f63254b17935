"""Connect the processes that torchrun starts, also after a restart, and report lost ones."""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from uuid import uuid4

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store
from torch.distributed.distributed_c10d import default_pg_timeout
from torchtune import training
from torchtune.utils import get_logger

from owlore_tune.distributed.world import ALONE, RankError, World
from owlore_tune.errors import CheckpointError, RunError

# Parts of torch.distributed's error messages if a process died or does not answer.
LOST_PROCESS = (
    "connection closed by peer", "connection reset", "timed out", "timeout", "broken pipe", "connection refused",
    "communicator was aborted", "remote process exited",
)  # fmt: skip


def current_world() -> World:
    """All processes of torch.distributed; only this one if it is not initialized."""
    return World(dist.group.WORLD) if dist.is_initialized() and dist.get_world_size() > 1 else ALONE


@contextmanager
def process_group(device: torch.device, timeout_s: float, cpu_offload: bool = False) -> Iterator[None]:
    """Initialize torch.distributed for the block if torchrun launched this process. Else do nothing.

    Args:
        device: the device of this process; it determines the backend. Host memory always goes through gloo, so that
            the messages of processes do not wait for a GPU.
        timeout_s: seconds to wait for other processes.
        cpu_offload: use all CPU cores; torchrun sets one per process.

    Raises:
        RunError: if another process died, or did not answer within ``timeout_s``.
    """
    if not training.is_distributed():
        yield
        return
    backend = training.get_distributed_backend(device.type, offload_ops_to_cpu=device.type != "cpu")
    rank = os.environ["RANK"]
    if cpu_offload:
        training.set_torch_num_threads()
    try:
        join_process_group(backend, timedelta(seconds=timeout_s))
    except RuntimeError as error:
        raise RunError(f"rank {rank} cannot join the others: {error}") from error
    try:
        if dist.get_rank() > 0:
            get_logger("INFO").setLevel(logging.ERROR)  # only rank 0 logs
        yield
    except (RunError, CheckpointError):
        raise
    except RankError as error:
        raise RunError(str(error)) from error
    except RuntimeError as error:
        if not any(words in str(error).lower() for words in LOST_PROCESS):
            raise
        raise RunError(
            f"rank {rank}: another process of the run died or did not answer within dist_timeout_s={timeout_s} s "
            f"({str(error).splitlines()[0]}). Checkpoints are intact; resume from the newest with "
            "resume_from_checkpoint=true"
        ) from error
    else:  # not after an error, because the others might never reach this call
        dist.destroy_process_group()
    finally:
        let_gloo_finish()


def join_process_group(backend: str, timeout: timedelta = default_pg_timeout) -> None:
    """``init_process_group`` from torchrun's environment variables, on a fresh store.

    torchrun keeps its store when it restarts processes. Entries of an earlier attempt would point them to dead
    addresses (pytorch/pytorch#135712).

    Raises:
        RuntimeError: if the other processes do not join within ``timeout``.
    """
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    store = fresh_store(store, rank, world_size, timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def let_gloo_finish() -> None:
    """Give gloo's threads time to free the tensors of the last calls.

    The threads live as long as DTensor's caches. If one frees the Python object of a tensor while Python shuts down, it
    aborts the process, and torchrun reports a finished run as failed (pytorch/pytorch#179291).
    """
    time.sleep(0.1)  # releases the GIL, which the threads wait for


def fresh_store(store: Store, rank: int, world_size: int, timeout: timedelta) -> Store:
    """An empty namespace of ``store``, shared by the processes that call this together.

    Rank 0 chooses its name. Every other rank posts a random word and reads the name under that word. An answer to a
    word of an earlier attempt is never read.
    """
    if rank > 0:
        word = uuid4().hex
        store.set(f"word_of_{rank}", word)
        name = store.get(word).decode()  # blocks until rank 0 answers
        store.set(f"{name}_{rank}", "")
        return PrefixStore(name, store)
    name = uuid4().hex
    end = time.monotonic() + timeout.total_seconds()
    missing = set(range(1, world_size))
    while missing:
        for other in missing:
            if store.check([f"word_of_{other}"]):
                store.set(store.get(f"word_of_{other}").decode(), name)
        missing = {other for other in missing if not store.check([f"{name}_{other}"])}
        if missing and time.monotonic() > end:
            raise RuntimeError(f"timed out waiting for ranks {sorted(missing)} to start")
        time.sleep(0.01)
    return PrefixStore(name, store)
