"""Outputs that appear complete or not at all: write beside the target, then rename."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from fastbert_hf.data.staging import is_disk_full, remove_leftovers, temporary_folder


def check_output_folder(path: str | Path) -> Path:
    """Say early whether a folder can be created or used at `path`; a temporary file is written to find out.

    Args:
        path: folder that a later step wants to write into; it need not exist.

    Returns:
        `path` as a `Path`.

    Raises:
        ValueError: if `path`, or a parent of it, is an existing file, or nothing can be written there.
    """
    path = Path(path)
    try:
        existing = next(part for part in (path, *path.absolute().parents) if os.path.lexists(part))
        if not existing.is_dir():
            what = "a broken link" if existing.is_symlink() and not existing.exists() else "a file"
            raise ValueError(f"the output folder {str(path)!r} cannot be made: {str(existing)!r} is {what}")
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", dir=existing)
        os.close(handle)
        os.unlink(name)
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"the output folder {str(path)!r} cannot be written: {reason}; choose another") from error
    return path


@contextlib.contextmanager
def staged_folder(target: str | Path, last: str = "config.json") -> Iterator[Path]:
    """Collect files in a temporary folder and move them into `target` at the end.

    The temporary folder lies in `target` where that exists, otherwise beside it: the parent of an existing folder
    may belong to somebody else, or to another disk.

    Other files already in `target` (checkpoints, logs) stay. If the body raises, nothing is moved. What a killed
    process was collecting for the same target is removed first.

    Args:
        target: folder that receives the files.
        last: name of the file that moves last. Readers recognise a folder by it, so that an interruption
            between two moves leaves a folder that does not load instead of one that mixes two models.

    Yields:
        The temporary folder.

    Raises:
        ValueError: if `target` is a file or cannot be written, or the disk is full.
    """
    target = check_output_folder(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_staged(target)
    try:
        with temporary_folder(target if target.is_dir() else target.parent, target.name) as stage:
            yield stage
            _move(stage, target, last)
    except (OSError, SafetensorError) as error:
        if not is_disk_full(error):
            raise
        raise ValueError(f"no room on the disk for {str(target)!r}: {error}") from error


def remove_staged(target: str | Path) -> None:
    """Remove what killed processes were collecting for a folder in `staged_folder`; what is in use stays.

    Args:
        target: the folder that was to receive the files; it need not exist.
    """
    target = Path(target)
    for parent in (target.parent, target):
        remove_leftovers(parent, target.name)


def _move(stage: Path, target: Path, last: str) -> None:
    """Move all files of a folder into another, `last` after all others."""
    target.mkdir(exist_ok=True)
    if (stage / last).exists():
        (target / last).unlink(missing_ok=True)
    names = [file.relative_to(stage) for file in stage.rglob("*") if not file.is_dir()]
    for name in sorted(names, key=lambda name: (name == Path(last), name)):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(stage / name, target / name)


def write_text(target: str | Path, text: str) -> None:
    """Write a text file whole: under a temporary name in the same folder, then renamed.

    Args:
        target: file to write; its folder is made if needed.
        text: the content, stored as UTF-8.

    Raises:
        ValueError: if the folder cannot be made because a file is in its place, or cannot be written.
    """
    target = Path(target)
    check_output_folder(target.parent).mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise
