"""Taking a model from the Hub: pinned to a commit, its files checked, on request converted to the native layout."""

import glob
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, RepoFile, constants, hf_hub_download, snapshot_download

from fastbert_hf.data.atomic import check_output_folder, staged_folder
from fastbert_hf.hub.access import explained, is_unreachable, patiently
from fastbert_hf.hub.convert import Conversion, convert
from fastbert_hf.hub.files import (
    PICKLED,
    check_paths,
    check_weights,
    checksum,
    expected_checksum,
    is_pickled,
    read_config,
    readable_size,
)


@dataclass
class Pulled:
    """What was taken.

    Attributes:
        repo, commit: where from.
        folder: the target folder, or the snapshot in the client's cache.
        files: their number, all of them checked.
        from_cache: whether the Hub was out of reach and the cache answered.
        conversion: the report, if one was asked for.
    """

    repo: str
    commit: str
    folder: Path
    files: int
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
    pulled = Pulled(repo, snapshot.name, snapshot, len(files), from_cache)
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


def _download(repo: str, revision: str | None) -> tuple[Path, dict[str, tuple[str, str]]]:
    """Everything but pickles into the cache: (snapshot, {path: what it must hash to})."""
    api = HfApi()
    for _ in range(3):  # the branch may move while it is read
        commit = patiently(api.model_info, repo, revision=revision).sha
        listing = patiently(lambda commit=commit: list(api.list_repo_tree(repo, revision=commit, recursive=True)))
        entries = [entry for entry in listing if isinstance(entry, RepoFile)]
        check_paths((entry.path for entry in entries), repo)
        check_weights((entry.path for entry in entries), repo)
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
    """Take config.json alone and look whether the rest is wanted."""
    for entry in wanted:
        if entry.path == "config.json":
            folder = Path(patiently(hf_hub_download, repo, entry.path, revision=commit)).parent
            _verify(repo, folder, {entry.path: expected_checksum(entry)})
            read_config(folder)
            return
    raise ValueError(f"{repo} holds no config.json; expected a model of FastBERT or crammedBERT")


def _cached(repo: str, revision: str | None) -> tuple[Path, dict[str, tuple[str, str]]]:
    """What `_download` left in the cache, where every file is stored under its checksum."""
    patterns = [f"*{suffix}" for suffix in PICKLED]
    snapshot = Path(snapshot_download(repo, revision=revision, local_files_only=True, ignore_patterns=patterns))
    files = {}
    for file in snapshot.rglob("*"):
        blob = file.resolve().name
        if file.is_file() and not is_pickled(file.name):
            files[file.relative_to(snapshot).as_posix()] = ("sha256" if len(blob) == 64 else "git", blob)
    check_weights(files, repo)
    read_config(snapshot)
    return snapshot, files


def _check_room(repo: str, wanted: list[RepoFile]) -> None:
    """Refuse early what cannot fit."""
    cache = Path(constants.HF_HUB_CACHE)
    while not cache.exists():
        cache = cache.parent
    size, free = sum(entry.size for entry in wanted), shutil.disk_usage(cache).free
    if size > free:
        raise ValueError(f"no room on the disk for {repo}: {readable_size(size)} wanted, {readable_size(free)} free")


def _verify(repo: str, snapshot: Path, files: dict[str, tuple[str, str]]) -> None:
    """Check every file; a wrong one is removed from the cache, so that the next attempt takes it anew."""
    for path, (kind, expected) in files.items():
        file = snapshot / path
        if not file.is_file():
            raise ValueError(f"{path} of {repo} did not arrive; run the command again")
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
