"""Files: outputs that appear complete or not at all, temporary folders that no killed process leaves, digests."""

import contextlib
import errno
import glob
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # Windows: folders cannot be locked there, so nothing is removed
    fcntl = None  # type: ignore[assignment]

MARK = ".being-written-"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_ROOM_WINDOWS = (39, 112)  # ERROR_HANDLE_DISK_FULL, ERROR_DISK_FULL
READ_AT_ONCE = 1 << 20  # bytes


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


@contextlib.contextmanager
def temporary_folder(parent: Path, name: str) -> Iterator[Path]:
    """Give an empty folder that is removed at the end; until then it is locked.

    Args:
        parent: existing folder to make it in.
        name: its name begins with a dot and this.

    Yields:
        The folder. If the process is killed, `remove_leftovers` with the same arguments removes it.
    """
    stage = Path(tempfile.mkdtemp(prefix=f".{name[:100]}.", dir=parent))
    lock = _lock(stage)
    if lock is not None:
        # It gets its name after its lock: a folder of that name without a lock belongs to nobody.
        marked = stage.with_name(f".{name[:100]}{MARK}{stage.name[-8:]}")
        os.rename(stage, marked)
        stage = marked
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def remove_leftovers(parent: Path, name: str) -> None:
    """Remove the folders that `temporary_folder` made in killed processes of this user; those in use stay.

    Args:
        parent, name: as given to `temporary_folder`; `parent` need not exist.
    """
    for folder in parent.glob(f"{glob.escape(f'.{name[:100]}{MARK}')}*"):
        lock = _lock(folder)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """Lock a folder of this user's until its handle is closed or the process ends; None if that cannot be done."""
    if fcntl is None:
        return None
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        if os.fstat(handle).st_uid == os.geteuid():
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
    except OSError:  # in use, or a file system without locks
        pass
    os.close(handle)
    return None


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is a full disk: no space, no quota, too large a file."""
    while error is not None:
        if getattr(error, "errno", None) in NO_ROOM:
            return True
        if isinstance(error, SafetensorError):  # it carries no errno, only its text
            number = re.search(r"\(os error (\d+)\)", str(error))
            if number and int(number[1]) in (NO_ROOM_WINDOWS if os.name == "nt" else NO_ROOM):
                return True
        error = error.__cause__
    return False


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    return _digest(Path(path), hashlib.sha256())


def git_digest(path: str | Path) -> str:
    """The name that git gives a file's content: the SHA-1 of it behind git's header, in hexadecimal."""
    path = Path(path)
    header = f"blob {path.stat().st_size}\0".encode()
    return _digest(path, hashlib.sha1(header, usedforsecurity=False))


def _digest(path: Path, digest) -> str:
    """Feed a file to a digest of hashlib."""
    with open(path, "rb") as file:
        while block := file.read(READ_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()
