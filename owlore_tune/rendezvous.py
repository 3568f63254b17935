"""How the processes that torchrun starts find each other, also when it starts them again."""

import time
from datetime import timedelta
from uuid import uuid4

import torch.distributed as dist
from torch.distributed import PrefixStore, Store
from torch.distributed.distributed_c10d import default_pg_timeout


def join_process_group(backend: str, timeout: timedelta = default_pg_timeout) -> None:
    """``init_process_group`` as torchrun's variables say.

    torchrun keeps its store when it starts processes again, and what an earlier attempt has left there would send them
    to addresses where nobody listens any more (pytorch/pytorch#135712).

    Raises:
        RuntimeError: if the other processes do not come within ``timeout``.
    """
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    store = fresh_store(store, rank, world_size, timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def fresh_store(store: Store, rank: int, world_size: int, timeout: timedelta) -> Store:
    """A part of ``store`` that belongs to the processes that call this together, and that nobody has written to.

    The first process names it, in answer to a word that each of the others has made up: one that is of an earlier
    attempt gets an answer that nobody reads.
    """
    if rank > 0:
        word = uuid4().hex
        store.set(f"word_of_{rank}", word)
        name = store.get(word).decode()  # waits for it
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
