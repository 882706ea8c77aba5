"""Compile the native kernels: `python -m fastbert_hf.kernels.native.build`, and what setup.py runs at installation.

Needs a C++ compiler (`$CXX`, c++, g++ or clang++) and the standard library, not torch: the result has a plain C ABI,
so one build serves every version of torch and Python.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
SOURCES = sorted((FOLDER / "csrc").glob("*.cpp"))
LIBRARY_NAME = "libfff.so"
FAILURE_NAME = "build_failure.txt"  # why the last build failed, for whoever asks for the backend later

# no contraction: fused products only where the kernels say so, or results would depend on the compiler's choices;
# no trapping comparisons: with them GCC turns the activations' choices into branches and leaves their loops scalar
FLAGS = (
    "-std=c++17",
    "-O3",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-exceptions",
    "-fno-rtti",
    "-fPIC",
    "-fvisibility=hidden",
)


class BuildError(RuntimeError):
    """The library could not be compiled; the message says why."""


def find_compiler() -> list[str]:
    """The command that calls the C++ compiler: $CXX, a launcher and flags included, else c++, g++ or clang++.

    Raises:
        BuildError: no such program, or $CXX is not a command.
    """
    wanted = os.environ.get("CXX", "").strip()
    try:
        candidates = [shlex.split(wanted)] if wanted else [["c++"], ["g++"], ["clang++"]]
    except ValueError as error:
        raise BuildError(f"CXX is {wanted!r}; expected a command ({error})") from error
    for name, *arguments in candidates:
        path = shutil.which(name)
        if path is not None:
            return [path, *arguments]
    tried = ", ".join(name for name, *_ in candidates)
    raise BuildError(f"no C++ compiler found (tried {tried}); install g++ or set CXX")


def build(output: Path, extra_flags: tuple[str, ...] = ()) -> None:
    """Compile the library into `output`.

    Raises:
        BuildError: unsupported system, no compiler, or a compiler's error.
    """
    if sys.platform == "win32":
        raise BuildError("the native kernels are for Linux and macOS")
    compiler = find_compiler()
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        objects = [Path(folder) / f"{source.stem}.o" for source in SOURCES]
        compilations = [
            subprocess.Popen(
                [*compiler, *FLAGS, *extra_flags, "-c", str(source), "-o", str(target)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for source, target in zip(SOURCES, objects)
        ]
        logs = [process.communicate()[0] for process in compilations]
        if any(process.returncode for process in compilations):
            raise BuildError(f"{shlex.join(compiler)} failed:\n" + "".join(logs)[-4000:])
        linked = Path(folder) / output.name
        command = [*compiler, "-shared", *extra_flags, *map(str, objects), "-o", str(linked)]
        link = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if link.returncode:
            raise BuildError(f"{shlex.join(compiler)} failed:\n{link.stdout[-4000:]}")
        # a rename replaces the file at once: processes that have the old library loaded keep it
        staged = output.with_name(f".{output.name}.{os.getpid()}")
        shutil.copyfile(linked, staged)
        os.replace(staged, output)


def build_or_explain(folder: Path) -> str | None:
    """Build into `folder`; on failure leave the reason in a file there and return it."""
    failure = folder / FAILURE_NAME
    failure.unlink(missing_ok=True)
    try:
        build(folder / LIBRARY_NAME)
    except (BuildError, OSError) as error:
        folder.mkdir(parents=True, exist_ok=True)
        failure.write_text(str(error))
        return str(error)
    return None


def main() -> int:
    reason = build_or_explain(FOLDER)
    print(f"built {FOLDER / LIBRARY_NAME}" if reason is None else f"native kernels not built: {reason}")
    return 0 if reason is None else 1


if __name__ == "__main__":
    sys.exit(main())
