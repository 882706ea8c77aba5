"""The files that make a folder a model of sentence-transformers: pooling, normalisation, prompts, longest text."""

import json
from pathlib import Path

MODULES = "modules.json"
# files of sentence-transformers beside modules.json and the folders that it names
# the longest text stands in a file that older versions named after the architecture
EMBEDDER_FILES = (
    MODULES,
    "config_sentence_transformers.json",
    *(f"sentence_{name}_config.json" for name in ("bert", "roberta", "distilbert", "camembert", "xlm-roberta")),
)


def is_embedder(folder: Path) -> bool:
    """Whether a folder holds a model of sentence-transformers."""
    return (folder / MODULES).is_file()


def module_paths(folder: Path) -> list[str]:
    """The folders of the modules of an embedder, as modules.json names them; the main folder is "".

    Raises:
        ValueError: the file is not a list of modules, or names a folder outside the model's own.
    """
    file = folder / MODULES
    try:
        paths = [module.get("path", "") for module in json.loads(file.read_text(encoding="utf-8"))]
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{str(file)!r} cannot be read: {error}") from error
    if not paths:
        raise ValueError(f"{str(file)!r} names no module")
    for path in paths:
        if not isinstance(path, str) or Path(path).is_absolute() or ".." in Path(path).parts:
            raise ValueError(f"{str(file)!r} names the folder {path!r}; expected one inside the model's")
    return ["" if Path(path) == Path() else path for path in paths]


def embedder_files(folder: Path) -> list[str]:
    """What a model of sentence-transformers has beside the transformer: paths below its folder, with "/".

    A module without settings has no files. Any other folder has none of these files.

    Raises:
        ValueError: as `module_paths`.
    """
    if not is_embedder(folder):
        return []
    files = {folder / name for name in EMBEDDER_FILES}
    for path in filter(None, module_paths(folder)):
        files |= set((folder / path).rglob("*"))
    return sorted(file.relative_to(folder).as_posix() for file in files if file.is_file())
