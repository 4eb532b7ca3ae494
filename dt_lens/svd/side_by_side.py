"""Small pieces of work done at once, each on one thread; large ones one after the other, each on all threads.

A product of small matrices gains little from a second thread, and what stands between products gains nothing. A result
must not depend on what is computed beside it, nor on the number of threads: sums that are split over threads round
differently. So a small piece always runs on one thread, and as many pieces run at once as torch has threads.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import TypeVar

import torch

from dt_lens.lens.forward_mode import one_thread

__all__ = ["SMALL", "in_order"]

SMALL = 2**22  # entries of a matrix up to which it is small, 32 MiB in float64

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    work: Callable[[Item], Result], items: Sequence[Item], size: Callable[[Item], int]
) -> Generator[Result, None, None]:
    """``work(item)`` for every item, in their order; ``size`` gives the number of entries of an item."""

    def alone(item: Item) -> Result:
        with one_thread():
            return work(item)

    threads = torch.get_num_threads()
    for small, group in groupby(items, key=lambda item: size(item) <= SMALL):
        some = list(group)
        if not small:
            yield from map(work, some)
        elif threads == 1 or len(some) == 1:
            yield from map(alone, some)
        else:
            pool = ThreadPoolExecutor(min(threads, len(some)), "dt_lens_svd")
            try:
                yield from pool.map(alone, some)
            finally:
                pool.shutdown(cancel_futures=True)
                torch.set_num_threads(threads)  # of threads that are started from now on
