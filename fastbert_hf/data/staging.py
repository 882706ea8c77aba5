"""Temporary folders in known places: what a killed process leaves behind is removed by the next one there."""

import contextlib
import errno
import glob
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
