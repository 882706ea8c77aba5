"""Taking a model from the Hub: pinned to a commit, its files checked, on request converted to the native layout."""

import glob
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, RepoFile, constants, hf_hub_download, snapshot_download

from fastbert_hf.files import check_output_folder, remove_staged, staged_folder
from fastbert_hf.hub.access import explained, is_unreachable, patiently
from fastbert_hf.hub.convert import Conversion, convert
from fastbert_hf.hub.files import check_paths, checksum, expected_checksum, read_config, readable_size
from fastbert_hf.hub.weights import (
    INDEX_SUFFIX,
    PICKLED,
    check_indexes,
    check_weight_names,
    check_weights,
    is_pickled,
)

# {path: (kind, checksum) for `checksum`}; None where a file's checksum is not known
Checksums = dict[str, tuple[str, str] | None]


@dataclass
class Pulled:
    """What was taken.

    Attributes:
        repo, commit: where from.
        folder: the target folder, or the snapshot in the client's cache.
        files: their number.
        unverified: how many of them the cache keeps no checksum of; without `from_cache` none.
        from_cache: whether the Hub was out of reach and the cache answered.
        conversion: the report, if one was asked for.
    """

    repo: str
    commit: str
    folder: Path
    files: int
    unverified: int
    from_cache: bool
    conversion: Conversion | None = None


def pull(repo: str, folder: str | Path | None = None, revision: str | None = None, to_native: bool = False) -> Pulled:
    """Take a FastBERT or crammedBERT repository; nothing in it is executed, pickles are not even downloaded.

    Args:
        repo: NAMESPACE/NAME.
        folder: receives the files, completely or not at all; None leaves them in the client's cache.
        revision: branch, tag or commit; the commit it stands for now is what is taken.
        to_native: convert to the native layout.

    Raises:
        ValueError: anything wrong with repository, revision, token, connection, disk or files.
    """
    if folder is not None:
        check_output_folder(folder)
        remove_staged(folder)  # before the room on the disk is looked at
    elif to_native:
        raise ValueError("--convert needs a target folder after the repository's name")
    with explained(repo, revision):
        try:
            snapshot, files = _download(repo, revision)
            from_cache = False
        except Exception as error:
            if not is_unreachable(error):
                raise
            snapshot, files = _cached(repo, revision)
            from_cache = True
        _verify(repo, snapshot, files)
        check_indexes(snapshot, files, repo)
        read_config(snapshot)
        unverified = sum(known is None for known in files.values())
        if unverified:
            check_weights(snapshot)
    pulled = Pulled(repo, snapshot.name, snapshot, len(files), unverified, from_cache)
    if folder is None:
        return pulled
    pulled.folder = Path(folder)
    with explained(repo, revision), staged_folder(folder) as stage:
        if to_native:
            pulled.conversion = convert(snapshot, stage)
        else:
            _copy(snapshot, stage, files)
        _remove_stale_weights(pulled.folder, stage)
    return pulled


def _download(repo: str, revision: str | None) -> tuple[Path, Checksums]:
    """Everything but pickles into the cache: (snapshot, {path: what it must hash to})."""
    api = HfApi()
    for _ in range(3):  # the branch may move while it is read
        commit = patiently(api.model_info, repo, revision=revision).sha
        listing = patiently(lambda commit=commit: list(api.list_repo_tree(repo, revision=commit, recursive=True)))
        entries = [entry for entry in listing if isinstance(entry, RepoFile)]
        check_paths((entry.path for entry in entries), repo)
        check_weight_names((entry.path for entry in entries), repo)
        wanted = [entry for entry in entries if not is_pickled(entry.path)]
        _check_kind(repo, commit, wanted)
        _check_room(repo, wanted)
        names = [glob.escape(entry.path) for entry in wanted]
        # by the revision's name, so that the cache can answer for it later
        snapshot = Path(patiently(snapshot_download, repo, revision=revision, allow_patterns=names))
        if snapshot.name == commit:
            return snapshot, {entry.path: expected_checksum(entry) for entry in wanted}
    raise ValueError(f"{repo} changed while it was read; give --revision a commit, such as {commit}")


def _check_kind(repo: str, commit: str, wanted: list[RepoFile]) -> None:
    """Take config.json and the indexes of weight files alone and look whether the rest is wanted."""
    paths = [entry.path for entry in wanted]
    if "config.json" not in paths:
        raise ValueError(f"{repo} holds no config.json; expected a model of FastBERT or crammedBERT")
    for entry in wanted:
        if entry.path == "config.json" or entry.path.endswith(INDEX_SUFFIX):
            file = Path(patiently(hf_hub_download, repo, entry.path, revision=commit))
            snapshot = file.parents[entry.path.count("/")]
            _verify(repo, snapshot, {entry.path: expected_checksum(entry)})
    read_config(snapshot)
    check_indexes(snapshot, paths, repo)


def _cached(repo: str, revision: str | None) -> tuple[Path, Checksums]:
    """What `_download` left in the cache."""
    patterns = [f"*{suffix}" for suffix in PICKLED]
    snapshot = Path(snapshot_download(repo, revision=revision, local_files_only=True, ignore_patterns=patterns))
    files = {
        file.relative_to(snapshot).as_posix(): _cached_checksum(file)
        for file in snapshot.rglob("*")
        if file.is_file() and not is_pickled(file.name)
    }
    check_weight_names(files, repo)
    return snapshot, files


def _cached_checksum(file: Path) -> tuple[str, str] | None:
    """What a cached file must hash to: it is a link to a file that is named after its checksum.

    Where the client cannot make symbolic links the file itself lies there, and its checksum is kept nowhere: None.
    """
    if not file.is_symlink():
        return None
    name = os.path.basename(os.readlink(file))  # of the first link: that file may be a link too
    if re.fullmatch("[0-9a-f]{64}", name):
        return "sha256", name
    return ("git", name) if re.fullmatch("[0-9a-f]{40}", name) else None


def _check_room(repo: str, wanted: list[RepoFile]) -> None:
    """Refuse early what cannot fit."""
    cache = Path(constants.HF_HUB_CACHE)
    while not cache.exists():
        cache = cache.parent
    size, free = sum(entry.size for entry in wanted), shutil.disk_usage(cache).free
    if size > free:
        raise ValueError(f"no room on the disk for {repo}: {readable_size(size)} wanted, {readable_size(free)} free")


def _verify(repo: str, snapshot: Path, files: Checksums) -> None:
    """Check every file whose checksum is known; a wrong one is removed, so that the next attempt takes it anew."""
    for path, known in files.items():
        file = snapshot / path
        if not file.is_file():
            raise ValueError(f"{path} of {repo} did not arrive; run the command again")
        if known is None:
            continue
        kind, expected = known
        actual = checksum(file, kind)
        if actual != expected:
            file.resolve().unlink()
            file.unlink(missing_ok=True)
            raise ValueError(
                f"{path} of {repo} has the {kind} checksum {actual}; expected {expected}. "
                "It was removed from the cache: run the command again"
            )


def _copy(snapshot: Path, target: Path, files: Iterable[str]) -> None:
    for path in files:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(snapshot / path, target / path)


def _remove_stale_weights(target: Path, stage: Path) -> None:
    """Remove weights that an earlier pull left and that would be read in place of the new ones."""
    for file in target.glob("model*.safetensors*"):
        if not (stage / file.name).exists():
            (target / "config.json").unlink(missing_ok=True)  # until the new one is there, nothing loads
            file.unlink()
