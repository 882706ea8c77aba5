#!/usr/bin/env python
"""Check a built wheel: its tag and files, then its kernels in a fresh environment where no compiler can be found.

    python tests/cli/check_wheel.py dist/fastbert_hf-0.1.0-py3-none-manylinux_2_17_x86_64.whl

Needs no package but pip. The environment is made in a temporary folder; pip installs torch and transformers into it.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

LIBRARY = "fastbert_hf/kernels/native/libfff.so"
FILES = (
    LIBRARY,
    "fastbert_hf/py.typed",
    "fastbert_hf/configs/pretrain/demo.yaml",
    "fastbert_hf/hub/model_card.md",
    "fastbert_hf/look/page.html",
)
RELATIVE_LINK = re.compile(r"\]\((?!https?://|#)")
CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"

# in the environment with the wheel: no compiler, and both forms of trees, also in int8, equal to the reference
KERNELS = """
import torch, fastbert_hf
from fastbert_hf.kernels import BACKENDS_BY_OP
from fastbert_hf.kernels.native import build
from fastbert_hf.quantized_layer import QuantizedFastFeedForward, QuantizedLeafFeedForward

try:
    raise SystemExit(f"a compiler was found: {build.find_compiler()}")
except build.BuildError:
    pass
torch.manual_seed(0)
x = torch.randn(64, 96)
layers = fastbert_hf.FastFeedForward(96, 96, depth=5), fastbert_hf.LeafFeedForward(96, 96, depth=3, leaf_width=16)
quantized = zip((QuantizedFastFeedForward, QuantizedLeafFeedForward), layers)
for layer in (*layers, *(kind.from_float(layer) for kind, layer in quantized)):
    results = []
    for backend in ("reference", "native"):
        with torch.no_grad(), fastbert_hf.use_backend(backend):
            results.append(layer(x))
    torch.testing.assert_close(*results)
for op, (native, *_) in BACKENDS_BY_OP.items():
    print(f"{op}: {native.name}, {native.describe()}, {fastbert_hf.__file__}")
"""


def check_contents(wheel: Path) -> None:
    """Check the name of a wheel, its files and its metadata.

    Args:
        wheel: with compiled kernels.

    Raises:
        ValueError: for a tag that is not py3-none-PLATFORM, a missing file, a library that was bundled, or a
            description with links that lead nowhere.
    """
    *_, python, abi, platform = wheel.stem.split("-")
    if (python, abi) != ("py3", "none") or platform == "any":
        raise ValueError(f"the tag is {python}-{abi}-{platform}; expected py3-none-PLATFORM")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (information,) = {name.split("/")[0] for name in names if name.split("/")[0].endswith(".dist-info")}
        metadata = archive.read(f"{information}/METADATA").decode()
    missing = [name for name in (*FILES, f"{information}/licenses/LICENSE") if name not in names]
    if missing:
        raise ValueError(f"{wheel.name} lacks {', '.join(missing)}")
    bundled = [name for name in names if ".so" in Path(name).name and name != LIBRARY]
    if bundled:  # a second OpenMP runtime beside torch's would have threads of its own
        raise ValueError(f"{wheel.name} carries {', '.join(bundled)}; expected {LIBRARY} alone")
    if RELATIVE_LINK.search(metadata):
        raise ValueError(f"the description of {wheel.name} has links to files of the repository")


def run_kernels(python: Path, path: Path | None = None) -> str:
    """Run the kernels of an installed wheel, with no program in PATH but those of its environment.

    Args:
        python: interpreter of the environment.
        path: folder with an unpacked wheel, in place of an installed one.

    Returns:
        One line for each op: the backend, how it runs, and where the package lies.

    Raises:
        ValueError: they do not run, or differ from the reference; with the output.
    """
    environment = {name: value for name, value in os.environ.items() if name not in ("CXX", "PYTHONPATH")}
    environment["PATH"] = str(python.parent)
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    command = [str(python), "-c", KERNELS]
    with tempfile.TemporaryDirectory() as folder:  # not the checkout, which has a package of its own
        result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise ValueError(f"the kernels do not run: {result.stdout}{result.stderr}")
    return result.stdout


def main(argv: list[str] | None = None) -> None:
    """Parse, check, print what ran."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    wheel = parser.parse_args(argv).wheel
    check_contents(wheel)
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:"]
        subprocess.run([*install, "-c", CONSTRAINTS, wheel.resolve()], check=True)
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB\n{run_kernels(python)}", end="")


if __name__ == "__main__":
    sys.exit(main())
