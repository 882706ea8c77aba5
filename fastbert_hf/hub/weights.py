"""Weight files, before a model is built from them: safe formats, no index that leads elsewhere, every file whole."""

from collections.abc import Collection, Iterable
from pathlib import Path, PurePosixPath

from safetensors import SafetensorError, safe_open

from fastbert_hf.checkpoint_fastbert import INDEX_SUFFIX, SUFFIX, index_names

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = (".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth")  # formats that can run code when opened


def is_pickled(path: str) -> bool:
    """Whether a file name is that of a format which can run code when it is opened."""
    return PurePosixPath(path).suffix.lower() in PICKLED


def check_weight_names(paths: Iterable[str], where: str) -> None:
    """Check that weights are there in a format that is only data.

    Args:
        paths: the files of a folder or a repository.
        where: its name, for the message.

    Raises:
        ValueError: no safetensors file; if there are pickles, with the reason why they are not read.
    """
    names = set(paths)
    if names & {WEIGHTS, INDEX}:
        return
    pickles = sorted(name for name in names if is_pickled(name))
    if pickles:
        raise ValueError(
            f"{where} has its weights in {pickles[0]} only: a pickle, which can run code when it is opened, so it is "
            f"never read here; expected {WEIGHTS} (its owner can convert it)"
        )
    raise ValueError(f"{where} holds no weights; expected {WEIGHTS}")


def check_indexes(folder: Path, paths: Collection[str], where: str) -> None:
    """Check that every index of weight files names only weight files that lie beside it.

    Args:
        folder: holds the indexes.
        paths: all files that belong to the model, relative to `folder`.
        where: the name of the folder or repository, for the message.

    Raises:
        ValueError: an index that is none, a path in place of a file's name, another format, or a missing file.
    """
    for path in sorted(paths):
        if path.endswith(INDEX_SUFFIX):
            beside = {PurePosixPath(p).name for p in paths if PurePosixPath(p).parent == PurePosixPath(path).parent}
            for name in index_names(folder / path, f"{path} of {where}"):
                if name not in beside:
                    raise ValueError(f"{path} of {where} names {name!r}, which is not there; expected a listed file")


def weight_files(folder: Path) -> list[Path]:
    """The files that a model is loaded from: model.safetensors, or what its index names; empty if there is neither.

    Raises:
        ValueError: an index that names something else than files beside it.
    """
    if (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file():
        return [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else []
    return [folder / name for name in index_names(folder / INDEX, f"{INDEX} of {folder}")]


def check_weights(folder: str | Path | None) -> None:
    """Check the weight files of a folder before anything is loaded; only headers are read.

    Args:
        folder: a model or a checkpoint; Hub names and None pass.

    Raises:
        ValueError: naming the folder and the first file that is cut off, damaged or missing, or an index that names
            something else than files beside it.
    """
    folder = Path(folder) if folder else None
    if folder is None or not folder.is_dir():
        return
    files = set(folder.glob(f"*{SUFFIX}"))
    for index in sorted(folder.glob(f"*{INDEX_SUFFIX}")):
        names = index_names(index, f"{index.name} of {folder}")
        # an index that an earlier save left beside the whole file is not read: what it names may be gone
        if not index.with_name(index.name.removesuffix(".index.json")).is_file():
            files |= {folder / name for name in names}
    for file in sorted(files):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"the weights in {str(folder)!r} cannot be read: {file.name}: {error}") from error


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The tensors that a model is loaded from: {name: shape}; only headers are read."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            names = tensors.keys()  # it is no dictionary
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in names}
    return shapes
