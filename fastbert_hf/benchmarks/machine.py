"""What a benchmark ran on: processor, versions, and the ceilings measured there."""

import platform
import subprocess
from pathlib import Path

import torch
import transformers

from fastbert_hf.benchmarks.timing import interleaved


def processor_name() -> str:
    """The processor's own name where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str:
    """The commit of the checkout this package lies in, with a mark when files differ; empty outside one."""
    folder = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True)
        changes = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=folder, capture_output=True)
    except OSError:
        return ""
    return head.stdout.strip() + ("+changes" if changes.returncode == 1 else "") if head.returncode == 0 else ""


def ceilings(threads: int) -> dict[str, float]:
    """Memory bandwidth (bytes/s, reading 256 MB) and float32 arithmetic (FLOP/s, a 2048-wide product), measured."""
    torch.set_num_threads(threads)
    big = torch.ones(64 << 20)
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    timings = interleaved({"read": big.sum, "product": lambda: a @ b}, rounds=5, least_seconds=0.05)
    return {
        "bytes_per_second": big.numel() * 4 / timings["read"].median,
        "flops_per_second": 2 * 2048**3 / timings["product"].median,
    }


def describe(thread_counts: list[int]) -> dict:
    """Everything a reader needs to place the numbers of a run."""
    from fastbert_hf.fff_op import BACKENDS

    return {
        "processor": processor_name(),
        "cores": torch.get_num_threads(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
        "backends": {name: backend.unavailable() or "available" for name, backend in BACKENDS.items()},
        "ceilings": {str(threads): ceilings(threads) for threads in thread_counts},
    }
