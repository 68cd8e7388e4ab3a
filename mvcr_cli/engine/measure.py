"""Measuring on a machine that does other things as well: interleaved times, peak memory, and no death by memory.

What the numbers mean:

    shown time      wall time of one call, accelerators waited for
    relative time   on a CPU the processor time of the calling thread, which other processes disturb far less (that of all
                    threads would count those that spin while they wait for work); elsewhere wall time
    peak memory     growth from before a network is made to the highest point of its work: on CUDA of torch's allocations,
                    on MPS of the driver's, on a CPU of the process's resident memory (Linux); where the system cannot
                    restart that count, the peak of the whole process so far
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from mvcr_cli.config import MEBIBYTE
from mvcr_cli.engine import peak_rss_mb
from mvcr_cli.errors import WorkerFailed, is_out_of_memory

T = TypeVar("T")
WARM_UP = 2
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass
class Times:
    """Seconds of every call: on the wall, and of the processor in the calling thread."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    @property
    def p50_ms(self) -> float:
        return 1000 * statistics.median(self.wall)

    @property
    def p95_ms(self) -> float:
        return float(1000 * np.percentile(self.wall, 95))

    def per_second(self, batch: int) -> float:
        return batch / statistics.median(self.wall)

    def over(self, other: Times, device: torch.device) -> float:
        """The ratio of the medians, least disturbed by other processes."""
        mine, theirs = statistics.median(self.processor), statistics.median(other.processor)
        if device.type == "cpu" and mine > 0 and theirs > 0:  # a coarse clock reads 0 for a short call
            return mine / theirs
        return self.p50_ms / other.p50_ms


def interleaved(calls: Sequence[Callable[[], object]], rounds: int, device: torch.device) -> list[Times]:
    """Time the calls by turns (A, B, A, B, ...), so that whatever disturbs the machine hits all of them."""
    wait = _waiter(device)
    for call in calls:
        for _ in range(WARM_UP):
            call()
    times = [Times() for _ in calls]
    wait()
    for _ in range(rounds):
        for call, taken in zip(calls, times, strict=True):
            wall, processor = time.perf_counter(), time.thread_time()
            call()
            wait()
            taken.processor.append(time.thread_time() - processor)
            taken.wall.append(time.perf_counter() - wall)
    return times


def _waiter(device: torch.device) -> Callable[[], None]:
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return torch.mps.synchronize if device.type == "mps" else lambda: None


def peak_memory(device: torch.device, work: Callable[[], T]) -> tuple[T, float]:
    """The result of `work`, and how far memory grew on the way, in MiB; see the top of this file."""
    gc.collect()  # networks of earlier rows
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = work()
        return result, (torch.cuda.max_memory_allocated(device) - before) / MEBIBYTE
    if device.type == "mps":
        torch.mps.empty_cache()
        before = torch.mps.driver_allocated_memory()
        result = work()
        return result, (torch.mps.driver_allocated_memory() - before) / MEBIBYTE
    restarted = restart_resident_peak()
    before = _status("VmRSS") if restarted else 0
    result = work()
    return result, max(0, _status("VmHWM") - before) / MEBIBYTE if restarted else peak_rss_mb()


def restart_resident_peak() -> bool:
    """Count this process's peak resident memory from now on; False where the system cannot."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what the heap keeps of earlier work would hide growth
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmHWM") > 0
    except OSError:
        return False


def _status(key: str) -> int:
    """Bytes of one entry of Linux's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:")), 0)


@contextlib.contextmanager
def refusing_out_of_memory(what: str, device: torch.device) -> Iterator[None]:
    """Work that may need more memory than there is ends in an error and not in a killed process.

    Raises: WorkerFailed.
    """
    try:
        with _capped() if device.type == "cpu" else contextlib.nullcontext():
            yield
    except Exception as error:  # onnxruntime's exceptions share no public base class with torch's
        if not is_out_of_memory(error):
            raise
        raise WorkerFailed(
            f"out of memory at {what}", "measure less at once: a smaller --batch, a smaller --imgsz, or --no-train"
        ) from error


@contextlib.contextmanager
def _capped() -> Iterator[None]:
    """Let allocations beyond the free memory fail, which can be reported; Linux would grant them and kill us later."""
    room = available_memory()
    if room is None:
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    cap = min(limit for limit in (_status("VmData") + room, soft, hard) if limit != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_DATA, (cap, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def available_memory() -> int | None:
    """Bytes that this process may still use; None where only Linux would tell.

    What the system keeps of files counts as available: it is given back, and how much there is depends on what was read
    lately.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        room = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    for limit in _CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no such group, or its limit is "max"
            room = min(room, max(0, int(limit.read_text()) - _status("VmRSS")))
    return room
