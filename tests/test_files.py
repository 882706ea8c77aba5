"""What a killed process was writing is removed by the next one; what a living one writes, and all else, stays."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from fastbert_hf.files import is_disk_full, remove_staged, staged_folder

WRITER = """
import os, sys
from fastbert_hf.files import staged_folder
with staged_folder(sys.argv[1]) as stage:
    (stage / "large.bin").write_bytes(bytes(1000))
    print(stage, flush=True)
    sys.stdin.read()
"""


def writer(target: Path) -> tuple[subprocess.Popen, Path]:
    """A process that is writing into its temporary folder, and that folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    return process, Path(process.stdout.readline().strip())


def kill(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    process.stdin.close()
    process.stdout.close()


@pytest.mark.parametrize("exists", [True, False])
def test_a_killed_writer_s_folder_is_removed_by_the_next_run_and_a_living_one_s_is_not(tmp_path, exists):
    target = tmp_path / "out"
    if exists:
        target.mkdir()
    living, in_use = writer(target)
    killed, leftover = writer(target)
    kill(killed)
    bystanders = [tmp_path / ".out.backup01", tmp_path / ".out2.being-written-abcdefgh"]
    for folder in bystanders:
        folder.mkdir()
    assert (leftover / "large.bin").is_file() and leftover.parent == (target if exists else tmp_path)
    try:
        with staged_folder(target) as stage:
            (stage / "config.json").write_text("{}")
        assert not leftover.exists()
        assert (in_use / "large.bin").is_file() and all(folder.is_dir() for folder in bystanders)
        living.stdin.close()  # its body ends
        assert living.wait(30) == 0
        assert sorted(os.listdir(target)) == ["config.json", "large.bin"]
    finally:
        living.kill()
        living.wait(30)
        living.stdout.close()


def test_a_link_with_the_name_of_a_leftover_is_not_followed(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "kept").touch()
    (tmp_path / ".out.being-written-abcdefgh").symlink_to(mine)
    remove_staged(tmp_path / "out")
    assert (mine / "kept").exists()


def test_a_full_disk_is_a_value_error_that_names_the_folder(tmp_path):
    full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    for error in (OSError(errno.ENOSPC, "No space left on device"), full):
        with pytest.raises(ValueError, match=r"no room on the disk for '.*out'"), staged_folder(tmp_path / "out"):
            raise error
    assert list(tmp_path.iterdir()) == []
    assert not is_disk_full(SafetensorError("header too small")) and not is_disk_full(OSError(errno.EACCES, "no"))
    with pytest.raises(PermissionError), staged_folder(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "no")
