"""Print which backends of the FFF op run on this machine, and why the others do not."""

import torch

from fastbert_hf.fff_op import BACKEND_VARIABLE, BACKENDS, select_backend


def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, CUDA: {torch.cuda.is_available()}")
    for backend in BACKENDS.values():
        reason = backend.unavailable()
        print(f"  {backend.name:10s} {'available' if reason is None else 'not available: ' + reason}")
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = torch.zeros(1, 8, device=device, dtype=dtype)
            weight = torch.zeros(7, 8, device=device, dtype=dtype)
            print(f"  {device} {str(dtype)[6:]}: {select_backend(x, weight, weight, 1, 2, 'gelu').name}")
    print(f"choose with fastbert_hf.use_backend(name) or {BACKEND_VARIABLE}=name")


if __name__ == "__main__":
    main()
