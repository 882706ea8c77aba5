"""Load the compiled kernels with ctypes and connect them to torch's threads."""

import ctypes
import functools
import os
import struct
from collections.abc import Callable, Sequence
from ctypes import c_char_p, c_double, c_int, c_int64, c_void_p
from pathlib import Path

import torch

# avx512_bf16, avx512, avx2 or generic; by default the best that the CPU and the build have
INSTRUCTION_SET_VARIABLE = "FASTBERT_NATIVE_ISA"
ABI_VERSION = 5
NO_RUNTIME, FORKED = 1, 2  # states of fff_threads_state
FOLDER = Path(__file__).resolve().parent

# pointers, then sizes (N, H, H_out, P), then depth, activation, dtype, threads
FORWARD_ARGUMENTS = [c_void_p] * 7 + [c_int64] * 4 + [c_int] * 4
BACKWARD_ARGUMENTS = [c_void_p] * 10 + [c_int64] * 4 + [c_int] * 4
# pointers, then sizes (N, H, H_out, P, w), then depth, activation, dtype, threads
LEAF_FORWARD_ARGUMENTS = [c_void_p] * 12 + [c_int64] * 5 + [c_int] * 4
LEAF_BACKWARD_ARGUMENTS = [c_void_p] * 17 + [c_int64] * 5 + [c_int] * 4
INT8_FORWARD_ARGUMENTS = [c_void_p] * 8 + [c_int64] * 4 + [c_int] * 4
INT8_LEAF_FORWARD_ARGUMENTS = [c_void_p] * 15 + [c_int64] * 5 + [c_int] * 4
INT8_LINEAR_ARGUMENTS = [c_void_p] * 6 + [c_int64] * 3 + [c_int] * 2
# pointers, then sizes (B, T, heads, d), then the scale, dtype, threads
ATTENTION_ARGUMENTS = [c_void_p] * 3 + [c_int64] * 4 + [c_double] + [c_int] * 2
INT8_ATTENTION_ARGUMENTS = [c_void_p] * 11 + [c_int64] * 4 + [c_double] + [c_int] * 2
# pointers, then sizes (N, H), then epsilon, dtype, threads
ADD_NORM_ARGUMENTS = [c_void_p] * 5 + [c_int64] * 2 + [c_double] + [c_int] * 2
FUNCTIONS = {
    "fff_forward": FORWARD_ARGUMENTS,
    "fff_backward": BACKWARD_ARGUMENTS,
    "fff_leaf_forward": LEAF_FORWARD_ARGUMENTS,
    "fff_leaf_backward": LEAF_BACKWARD_ARGUMENTS,
    "fff_int8_forward": INT8_FORWARD_ARGUMENTS,
    "fff_int8_leaf_forward": INT8_LEAF_FORWARD_ARGUMENTS,
    "fff_int8_linear": INT8_LINEAR_ARGUMENTS,
    "fff_attention": ATTENTION_ARGUMENTS,
    "fff_int8_attention": INT8_ATTENTION_ARGUMENTS,
    "fff_add_norm": ADD_NORM_ARGUMENTS,
}


class LibraryError(RuntimeError):
    """The library cannot be used; the message says why."""


def _open_library() -> ctypes.CDLL:
    from .build import FAILURE_NAME, LIBRARY_NAME  # here: `python -m ...native.build` imports this module first

    path = FOLDER / LIBRARY_NAME
    if not path.exists():
        failure = FOLDER / FAILURE_NAME
        reason = failure.read_text() if failure.exists() else "it is compiled when the package is installed"
        raise LibraryError(f"the compiled library is missing ({reason})")
    try:
        library = ctypes.CDLL(str(path))
        version = library.fff_abi_version()
    except (OSError, AttributeError) as error:
        raise LibraryError(f"{path} does not load: {error}") from error
    if version != ABI_VERSION:
        raise LibraryError(
            f"{path} has ABI version {version}, this package wants {ABI_VERSION}; install the package again"
        )
    for name, arguments in FUNCTIONS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, c_int
        if hasattr(library, f"{name}_packed"):
            getattr(library, f"{name}_packed").argtypes = [c_char_p]
    library.fff_instruction_set.restype = c_char_p
    library.fff_int8_products.restype = c_char_p
    library.fff_threads_state.restype = c_int
    library.fff_select_instruction_set.argtypes = [c_char_p]
    library.fff_set_parallel_region.argtypes = [c_void_p]
    return library


def packed(function: Callable[[bytes], int], arguments: Sequence) -> Callable[..., int]:
    """A function of the library that takes one block of words, called with one integer an argument.

    Args:
        arguments: the types of the arguments that the block holds.
    """
    pack = struct.Struct(f"{len(arguments)}q").pack
    return lambda *words: function(pack(*words))


def _parallel_region_of_torch() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime that torch runs on, or None.

    libgomp, Intel's and LLVM's runtimes have it. Looked up where torch's own calls find it: among the global symbols,
    then in what libtorch_cpu depends on.
    """
    torch_library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    for name in (None, str(torch_library)):
        try:
            symbol = ctypes.CDLL(name).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(symbol, c_void_p).value
    return None


@functools.cache
def load_library() -> ctypes.CDLL:
    """The library, connected to torch's OpenMP runtime, its instruction set chosen.

    Raises:
        LibraryError: missing, not loadable, or FASTBERT_NATIVE_ISA asks for what the CPU lacks.
    """
    library = _open_library()
    library.fff_set_parallel_region(_parallel_region_of_torch())
    wanted = os.environ.get(INSTRUCTION_SET_VARIABLE)
    if wanted and not library.fff_select_instruction_set(wanted.encode()):
        raise LibraryError(f"{INSTRUCTION_SET_VARIABLE}={wanted!r} is unknown or this CPU does not have it")
    return library


def why_one_thread() -> str | None:
    """Why the kernels run on the calling thread alone in this process, or None where they use torch's threads."""
    state = load_library().fff_threads_state()
    if state == FORKED:
        return "this process was forked, and OpenMP's threads stayed with its parent"
    if state == NO_RUNTIME:
        return "torch's OpenMP runtime has no GOMP_parallel to share its threads"
    if torch.get_num_threads() == 1:
        return "torch.get_num_threads() is 1"
    return None


def describe() -> str:
    """Which instruction set runs, and on how many threads; why on one, if so."""
    instruction_set = load_library().fff_instruction_set().decode()
    if os.environ.get(INSTRUCTION_SET_VARIABLE):
        instruction_set += f" (chosen by {INSTRUCTION_SET_VARIABLE})"
    reason = why_one_thread()
    threads = f"up to {torch.get_num_threads()} threads of torch" if reason is None else f"one thread: {reason}"
    return f"instruction set {instruction_set}, {threads}"


@functools.cache
def why_unavailable() -> str | None:
    """Why the library cannot be used in this process, or None."""
    try:
        load_library()
    except LibraryError as error:
        return str(error)
    return None
