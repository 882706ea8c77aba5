"""Print which backends of each op run on this machine and how, and why the others do not."""

from itertools import takewhile

import torch

from fastbert_hf.backends_fastbert import BACKEND_VARIABLE, BACKENDS, backend_for


def state(backend) -> str:
    """Whether a backend is available, with what it says of itself, or why not."""
    reason = backend.unavailable()
    if reason is not None:
        return f"not available: {reason}"
    return f"available: {backend.describe()}" if hasattr(backend, "describe") else "available"


def choice(op: str, call: tuple) -> str:
    """The backend that takes a call of an op, and why those that are preferred and available decline it."""
    taken, reasons = backend_for(op, *call).name, []
    for backend in takewhile(lambda backend: backend.name != taken, BACKENDS[op].values()):
        reason = None if backend.unavailable() else backend.supports(*call)
        if reason is not None:
            reasons.append(f"{backend.name}: {reason}")
    return f"{taken} ({'; '.join(reasons)})" if reasons else taken


def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, CUDA: {torch.cuda.is_available()}")
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for op, backends in BACKENDS.items():
        print(f"backends of the op {op}:")
        for backend in backends.values():
            print(f"  {backend.name:10s} {state(backend)}")
        for device in devices:
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                x = torch.zeros(1, 8, device=device, dtype=dtype)
                print(f"  {device} {str(dtype)[6:]}: {choice(op, (x, x, x, 1, 0, 'gelu'))}")  # one node, or one leaf
    print(f"choose with fastbert_hf.use_backend(name) or {BACKEND_VARIABLE}=name")


if __name__ == "__main__":
    main()
