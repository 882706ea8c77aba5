"""Putting a model on the Hub: rights first, then one commit of everything a stranger needs, then the proof."""

import glob
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import torch
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    RepoFile,
    constants,
    get_token,
    snapshot_download,
)
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from fastbert_hf.checkpoint_fastbert import SUFFIX
from fastbert_hf.files import check_output_folder, is_disk_full, remove_leftovers, temporary_folder
from fastbert_hf.hub.access import check_write_access, explained, patiently
from fastbert_hf.hub.card import CARD, DISTILLATION_PAGE, render_card
from fastbert_hf.hub.embedder import embedder_files
from fastbert_hf.hub.files import (
    LICENCE_FILES,
    TOKENIZER_FILES,
    check_paths,
    checksum,
    expected_checksum,
    largest_difference,
    load_model,
    readable_size,
    sample_outputs,
)
from fastbert_hf.hub.weights import INDEX, is_pickled

STAGE, VERIFY = "fastbert-push", "fastbert-verify"  # folders for temporary files


@dataclass
class PushOptions:
    """How a model is pushed; the names are those of the command line."""

    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    commit_message: str = "Upload FastBERT model"
    license: str | None = None
    benchmark: Path | None = None
    max_shard_size: str = "5GB"


@dataclass
class Pushed:
    """What was pushed.

    Attributes:
        commit: the commit that holds the files; a new one, or the last one if nothing had changed.
        changed: whether a commit was made.
        url: where people see it.
        sizes: bytes of every file, by path.
        difference: maximal absolute difference between the outputs of the folder and of the pushed model.
    """

    repo: str
    commit: str
    changed: bool
    url: str
    sizes: dict[str, int]
    difference: float


@dataclass
class StagedUpload:
    """A folder as it will be on the Hub, and what its model computes."""

    folder: Path
    outputs: list[torch.Tensor] = field(default_factory=list)

    def files(self) -> list[Path]:
        """All files, with those of subfolders; the weights first, the card last."""
        paths = {self.path(file): file for file in self.folder.rglob("*") if file.is_file()}
        return [
            paths[path] for path in sorted(paths, key=lambda path: (not path.endswith(SUFFIX), path == CARD, path))
        ]

    def path(self, file: Path) -> str:
        """Where a file lies in the repository."""
        return file.relative_to(self.folder).as_posix()

    def sizes(self) -> dict[str, int]:
        """Bytes of every file by its path, in the order of `files`."""
        return {self.path(file): file.stat().st_size for file in self.files()}


@contextmanager
def stage_upload(source: Path, repo: str, options: PushOptions) -> Iterator[StagedUpload]:
    """Write what will be pushed into a temporary folder; the same model gives the same bytes every time.

    Args:
        source: folder of a model in either layout.
        repo: NAMESPACE/NAME, for the card.
        options: shards, licence, figures.

    Raises:
        ValueError: `source` holds no whole FastBERT, or a file that would be pushed holds the token.
    """
    for name in (STAGE, VERIFY):
        remove_leftovers(_temporary_parent(), name)
    with temporary_folder(_temporary_parent(), STAGE) as stage:
        with explained(repo):
            try:
                outputs = _fill(stage, Path(source), repo, options)
            except OSError as error:
                if is_disk_full(error):
                    raise
                raise ValueError(f"{error.filename or source}: {error.strerror or error}") from error
        yield StagedUpload(stage, outputs)


def _temporary_parent() -> Path:
    """Where temporary folders are made.

    Raises:
        ValueError: nothing can be written there.
    """
    try:
        return check_output_folder(tempfile.gettempdir())
    except OSError as error:  # none of the usual places
        raise ValueError(f"no temporary folder can be made: {error}; TMPDIR names another place") from error


def _fill(stage: Path, source: Path, repo: str, options: PushOptions) -> list[torch.Tensor]:
    """Write what `prepared` promises into an empty folder; what the model computes."""
    model = load_model(source)
    model.save_pretrained(stage, max_shard_size=options.max_shard_size)
    for name in (*TOKENIZER_FILES, *LICENCE_FILES, DISTILLATION_PAGE):
        if (source / name).is_file():
            shutil.copyfile(source / name, stage / name)
    _copy_embedder(source, stage)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    declared = {"license": options.license} if options.license else {}
    card = render_card(source, model.config, type(model).__name__, parameters, repo, declared, options.benchmark)
    (stage / CARD).write_text(card, encoding="utf-8")
    check_no_token(stage)
    return sample_outputs(model)


def _copy_embedder(source: Path, stage: Path) -> None:
    """Copy what makes the model a sentence embedder.

    Raises:
        ValueError: one of its files is a link that leaves the folder, has a path that some system reads otherwise, or
            is a pickle without safetensors beside it.
    """
    paths = embedder_files(source)
    check_paths(paths, str(source))
    folders = {PurePosixPath(path).parent for path in paths if path.endswith(SUFFIX)}  # with weights that are data
    for path in paths:
        if not (source / path).resolve().is_relative_to(source.resolve()):
            raise ValueError(f"{path} of {str(source)!r} is a link that leaves the folder; expected a plain file")
        if is_pickled(path):
            if PurePosixPath(path).parent in folders:
                continue
            raise ValueError(f"{path} of {str(source)!r} is a pickle, which is never pushed; expected safetensors")
        if not (stage / path).exists():  # what the model has written stays
            (stage / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / path, stage / path)


def check_no_token(folder: Path) -> None:
    """Check that no text file of a folder holds the user's token.

    Raises:
        ValueError: naming the file.
    """
    token = get_token()
    for file in folder.rglob("*"):
        if token and file.is_file() and file.suffix != ".safetensors" and token.encode() in file.read_bytes():
            path = file.relative_to(folder).as_posix()
            raise ValueError(f"{path} holds your Hub token; expected none. Remove it, and revoke the token")


def push(source: str | Path, repo: str, options: PushOptions) -> Pushed:
    """Push the model of a folder, then load the pushed revision and compare it.

    One commit holds everything, so that no reader sees half of it. What has not changed is not sent; parts of an
    interrupted push that arrived are not sent again.

    Args:
        source: folder of a FastBERT or crammedBERT model, with or without tokenizer.
        repo: NAMESPACE/NAME, or NAME in one's own namespace.
        options: see `PushOptions`.

    Raises:
        ValueError: missing token or rights, a bad folder, a conflict, or a pushed model that differs.
    """
    if options.create_pr and options.revision not in (None, "main"):
        raise ValueError(f"--create_pr opens against main; got --revision {options.revision!r} too")
    api = HfApi()
    repo = check_write_access(api, repo) if not options.create_pr else _check_token(api, repo)
    head = _head(api, repo, options)
    with explained(repo, options.revision), stage_upload(Path(source), repo, options) as folder:
        if head is None:
            head = _create(api, repo, options)
        pushed = _commit(api, repo, options, folder, head)
        verify(api, folder, pushed)
    return pushed


def _check_token(api: HfApi, repo: str) -> str:
    """Anybody with a token may propose changes."""
    with explained(repo):
        user = patiently(api.whoami)
    return repo if "/" in repo else f"{user['name']}/{repo}"


def _head(api: HfApi, repo: str, options: PushOptions) -> str | None:
    """The commit that the push starts from; None if repository or branch are still to be made.

    Raises:
        ValueError: a public repository where a private one is asked for, or none to propose changes to.
    """
    with explained(repo):
        try:
            info = patiently(api.model_info, repo)
        except RepositoryNotFoundError:
            if options.create_pr:
                raise
            return None
    if options.private and not info.private:
        raise ValueError(f"{repo} exists and is public; --private only works for a new repository")
    if options.revision is None:
        return info.sha
    with explained(repo):
        try:
            return patiently(api.model_info, repo, revision=options.revision).sha
        except RevisionNotFoundError:
            return None


def _create(api: HfApi, repo: str, options: PushOptions) -> str:
    patiently(api.create_repo, repo, private=options.private or None, exist_ok=True)
    if options.revision is not None:
        patiently(api.create_branch, repo, branch=options.revision, exist_ok=True)
    return patiently(api.model_info, repo, revision=options.revision).sha


def _commit(api: HfApi, repo: str, options: PushOptions, folder: StagedUpload, head: str) -> Pushed:
    files = folder.files()
    names = {folder.path(file) for file in files}
    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    for path in patiently(api.list_repo_files, repo, revision=head):
        # what an earlier push left and would now contradict the weights; everything else is not ours to remove
        stale = path.endswith(".safetensors") or path == INDEX or is_pickled(path)
        if stale and "/" not in path and path not in names:
            operations.append(CommitOperationDelete(path_in_repo=path))
    operations += [CommitOperationAdd(path_in_repo=folder.path(file), path_or_fileobj=file) for file in files]
    info = api.create_commit(
        repo,
        operations,
        commit_message=options.commit_message,
        revision=options.revision,
        create_pr=options.create_pr,
        parent_commit=head,
    )
    url = str(info.pr_url or info.commit_url)
    return Pushed(repo, info.oid, info.oid != head, url, folder.sizes(), float("nan"))


def verify(api: HfApi, folder: StagedUpload, pushed: Pushed) -> None:
    """Download the pushed commit anew, compare every file's checksum and the model's outputs.

    Raises:
        ValueError: naming the file, or the difference of the outputs.
    """
    repo = pushed.repo
    with temporary_folder(_temporary_parent(), VERIFY) as cache:
        listing = patiently(lambda: list(api.list_repo_tree(repo, revision=pushed.commit, recursive=True)))
        entries = {entry.path: entry for entry in listing if isinstance(entry, RepoFile)}
        paths = {folder.path(file): file for file in folder.files()}
        again = patiently(
            snapshot_download,
            repo,
            revision=pushed.commit,
            cache_dir=cache,
            allow_patterns=[glob.escape(path) for path in paths],
            force_download=True,
        )
        for path, file in paths.items():
            if path not in entries:
                raise ValueError(f"{path} did not arrive in {repo} at {pushed.commit}")
            kind, expected = expected_checksum(entries[path])
            if not checksum(file, kind) == expected == checksum(Path(again, path), kind):
                raise ValueError(f"{path} in {repo} at {pushed.commit} differs from what was pushed; push again")
        pushed.difference = largest_difference(folder.outputs, sample_outputs(load_model(Path(again))))
    if pushed.difference != 0:
        raise ValueError(f"the model in {repo} at {pushed.commit} gives other outputs: by {pushed.difference:g}")


def file_lines(sizes: dict[str, int]) -> list[str]:
    """A table of files and sizes for people."""
    width = max(map(len, sizes))
    total = f"{'in all':<{width}}  {readable_size(sum(sizes.values())):>9}"
    return [*(f"{name:<{width}}  {readable_size(size):>9}" for name, size in sizes.items()), total]


def endpoint() -> str:
    """The Hub that is spoken to."""
    return constants.ENDPOINT
