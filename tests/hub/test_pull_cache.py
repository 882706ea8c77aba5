"""Pulling without a connection from every form of the client's cache, and after a pull that was killed."""

import os
import shutil
import signal
import subprocess
import sys

import pytest

from tests.hub.conftest import ROOT, folder_files, hub_environment
from tests.hub.test_pull import pulled, refused
from tests.processes import CHILD_SECONDS

NO_LINKS = "import huggingface_hub.file_download as f\n"
NO_LINKS += "f.real = f.are_symlinks_supported; f.are_symlinks_supported = lambda *a, **k: False"
LINKS = "import huggingface_hub.file_download as f; f.are_symlinks_supported = f.real"


def cached_files(client, repo):
    (snapshot,) = client.home.glob(f"hub/models--{repo.replace('/', '--')}/snapshots/*")
    return {file.relative_to(snapshot).as_posix(): file for file in snapshot.rglob("*") if not file.is_dir()}


def test_a_cache_without_symbolic_links_answers_and_says_that_it_keeps_no_checksums(
    client, hub, repo, folder, tmp_path
):
    hub.add(repo, folder_files(folder))
    client.python(NO_LINKS)
    try:
        assert "checksums verified" in pulled(client, repo)
    finally:
        client.python(LINKS)
    files = cached_files(client, repo)
    assert not any(file.is_symlink() for file in files.values())
    hub.stop()
    printed = pulled(client, repo, tmp_path / "out")
    assert f"{len(files)} files, {len(files)} of them not verified: a cache without symbolic links" in printed
    assert "checksums verified" not in printed
    assert folder_files(tmp_path / "out") == folder_files(folder)
    assert cached_files(client, repo).keys() == files.keys()  # nothing was deleted

    weights = files["model.safetensors"]
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "cannot be read: model.safetensors" in refused(client, repo)
    assert weights.exists()


def test_a_file_without_a_link_beside_linked_ones_is_the_only_one_not_verified(client, hub, repo, folder):
    hub.add(repo, folder_files(folder))
    pulled(client, repo)
    hub.stop()
    config = cached_files(client, repo)["config.json"]
    content = config.read_bytes()
    config.unlink()
    config.write_bytes(content)
    assert "1 of them not verified" in pulled(client, repo)
    assert config.read_bytes() == content


def test_the_checksum_is_the_name_of_the_first_link_where_that_file_is_a_link_too(client, hub, repo, folder):
    """As the client lays out its store of files that several repositories share."""
    hub.add(repo, folder_files(folder))
    pulled(client, repo)
    hub.stop()
    weights = cached_files(client, repo)["model.safetensors"]
    shared = client.home / "hub" / "blobs" / "ab" / ("ab" * 32)
    shared.parent.mkdir(parents=True)
    blob = weights.resolve()
    shutil.move(blob, shared)
    blob.symlink_to(shared)
    try:
        assert "checksums verified" in pulled(client, repo)
        shared.write_bytes(b"\0" + shared.read_bytes()[1:])
        assert "model.safetensors" in refused(client, repo)  # it is still checked
    finally:
        shutil.rmtree(shared.parents[1])


KILLED = """
import os, shutil, signal, sys
sys.path.insert(0, "scripts")
import pull_from_hub
copy, copied = shutil.copyfile, []
def copyfile(source, target):
    copied.append(copy(source, target))
    if len(copied) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
shutil.copyfile = copyfile
pull_from_hub.main(sys.argv[1:])
"""


@pytest.mark.parametrize("exists", [True, False])
def test_a_pull_cleans_up_after_one_that_was_killed(client, hub, repo, folder, tmp_path, exists):
    hub.add(repo, folder_files(folder))
    target = tmp_path / "out"
    if exists:
        target.mkdir()
    before = set(os.listdir(tmp_path))
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, repo, str(target)],
        cwd=ROOT,
        env=hub_environment(hub.url, client.home, PYTHONPATH=str(ROOT)),
        capture_output=True,
        timeout=CHILD_SECONDS,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = os.listdir(target) if exists else set(os.listdir(tmp_path)) - before
    assert len(left) == 1  # otherwise there is nothing to test
    client.python("import shutil, collections as c; shutil.real = shutil.disk_usage")
    client.python("import shutil, collections as c; shutil.disk_usage = lambda p: c.namedtuple('D', 'free')(10)")
    try:
        assert "no room on the disk" in refused(client, repo, target)  # room is made before it is looked for
    finally:
        client.python("import shutil; shutil.disk_usage = shutil.real")
    assert set(os.listdir(tmp_path)) == before and (not exists or not os.listdir(target))
    pulled(client, repo, target)
    assert folder_files(target) == folder_files(folder)
    assert set(os.listdir(tmp_path)) == before | {"out"}
