"""Restarted processes ignore store entries of earlier attempts."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import HashStore, TCPStore

from owlore_tune.distributed.launch import fresh_store

TIMEOUT = timedelta(seconds=20)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_every_attempt_has_a_part_of_the_store_of_its_own(num_ranks):
    """Each attempt sees only entries of its own processes, not of earlier or failed attempts."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    clients = [TCPStore("127.0.0.1", server.port, wait_for_workers=False) for _ in range(num_ranks)]
    for rank in range(1, num_ranks):
        server.set(f"word_of_{rank}", "left by a rank that was killed before it had an answer")

    def attempt(rank: int, value: str) -> tuple[bool, list[str]]:
        store = fresh_store(clients[rank], rank, num_ranks, TIMEOUT)
        store.set_timeout(TIMEOUT)
        was_there = store.check([f"address_of_{rank}"])
        store.set(f"address_of_{rank}", value)
        return was_there, [store.get(f"address_of_{other}").decode() for other in range(num_ranks)]

    for value in ("first", "second"):
        with ThreadPoolExecutor(num_ranks) as pool:
            results = list(pool.map(attempt, range(num_ranks), [value] * num_ranks))
        assert results == [(False, [value] * num_ranks)] * num_ranks


def test_a_rank_that_does_not_come_is_named():
    with pytest.raises(RuntimeError, match=r"timed out waiting for ranks \[1, 2\] to start"):
        fresh_store(HashStore(), 0, 3, timedelta(seconds=0.1))
