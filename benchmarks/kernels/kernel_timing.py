"""Times and memory of runs: CUDA events behind a flushed cache, or a clock on the CPU; several sides in turn."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Run = Callable[[], dict[str, Tensor]]

# More than the L2 cache of any current GPU holds, so that a run finds nothing of its last one there.
FLUSHED_BYTES = 256 * 2**20


class Clock:
    """Times runs on one device.

    Args:
        device: where they run.
        seconds: to spend on each side of a case.
        rounds: fewest and most times that a side runs.

    On a GPU a run is started while the cache is still being flushed, so that launching it takes no time unless it takes
    longer than that (0.1 ms or so): what is timed is the device.
    """

    def __init__(self, device: torch.device, seconds: float, rounds: tuple[int, int]) -> None:
        self.device = device
        self.seconds = seconds
        self.rounds = rounds
        self.cuda = device.type == "cuda"
        self._flushed = torch.empty(FLUSHED_BYTES if self.cuda else 0, dtype=torch.int8, device=device)

    def wait(self) -> None:
        """Wait for everything that was started; asynchronous failures are raised here."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        """Give what earlier cases left in the allocator's cache back: a large case might not find a place in it."""
        if self.cuda:
            torch.cuda.empty_cache()

    def times(self, runs: Sequence[Run], launches: bool = False) -> list[list[float]]:
        """Time runs in turn: what slows the machine down for a while slows all.

        Args:
            runs: warmed up. The slow ones run less often; a round always starts with the first run.
            launches: start a run on an idle device, so that launching it counts.

        Returns:
            Per run the seconds of each of its rounds; equal indices were measured one after the other.
        """
        counts = [self._count(min(self._once(run, launches) for _ in range(3))) for run in runs]
        taken: list[list[Callable[[], float]]] = [[] for _ in runs]
        for index in range(max(counts)):
            for run, count, results in zip(runs, counts, taken, strict=True):
                if index < count:
                    results.append(self._start(run, launches))
        self.wait()
        return [[read() for read in results] for results in taken]

    def median(self, run: Run) -> float:
        """Warm a single run up and return its median time in seconds."""
        for _ in range(3):
            run()
        return statistics.median(self.times([run])[0])

    def extra_bytes(self, run: Run) -> int | None:
        """Return the peak memory of a run beyond what is allocated before it, including results; None without CUDA."""
        if not self.cuda:
            return None
        self.wait()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        run()
        self.wait()
        return torch.cuda.max_memory_allocated(self.device) - before

    def _count(self, seconds: float) -> int:
        fewest, most = self.rounds
        return min(max(math.ceil(self.seconds / max(seconds, 1e-7)), fewest), most)

    def _once(self, run: Run, launches: bool) -> float:
        read = self._start(run, launches)
        self.wait()
        return read()

    def _start(self, run: Run, launches: bool) -> Callable[[], float]:
        """Start a run; returns a function that gives its seconds once everything has finished."""
        if not self.cuda:
            begin = time.perf_counter()
            run()
            taken = time.perf_counter() - begin
            return lambda: taken
        self._flushed.zero_()
        if launches:
            self.wait()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        return lambda: begin.elapsed_time(end) / 1000


def captured(run: Run) -> Run:
    """Return a run as a CUDA graph: the same kernels on the same memory in a single launch."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()

    def replay() -> dict[str, Tensor]:
        graph.replay()
        return results

    return replay
