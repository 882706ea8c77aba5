# Copyright 2026 The FastBERT authors. Licensed under the MIT License.
"""Whether a checkpoint may be read, and whether its tensors fit a model.

An index of weight files may name only files beside it; a missing or unknown tensor is an error, not a line in a log.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from torch import nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

SUFFIX, INDEX_SUFFIX = ".safetensors", ".safetensors.index.json"
# options of `from_pretrained` that say where files are
PLACES = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")


def read_json(file: str | Path) -> dict[str, Any]:
    """The object in a JSON file that others wrote; empty if there is no such file.

    Raises:
        ValueError: the file cannot be read or is not a JSON object.
    """
    file = Path(file)
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also bytes that are no text, and numbers too long to read
        raise ValueError(f"{str(file)!r} is not JSON: {error}") from error
    except OSError as error:
        raise ValueError(f"{str(file)!r} cannot be read: {error.strerror or error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(file)!r} holds {type(content).__name__}; expected a JSON object")
    return content


def index_names(file: str | Path, what: str) -> list[str]:
    """The weight files that an index names, every one a plain name that ends in .safetensors.

    Args:
        file: the index.
        what: how the message calls it.

    Raises:
        ValueError: it is no index, or names something else.
    """
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{what} has weight_map {_short(weight_map)}; expected an object of file names")
    for name in weight_map.values():
        check_plain_name(name, what)
    return sorted(set(weight_map.values()))


def check_plain_name(name: object, what: str) -> None:
    """Check that a name is that of a weight file beside the file that names it.

    Loading opens whatever is named, also "/elsewhere/x.safetensors", "../x.safetensors" and pickles.

    Raises:
        ValueError: a path in place of a file's name, or another format.
    """
    plain = isinstance(name, str) and name == PurePosixPath(name).name == PureWindowsPath(name).name
    if not plain or not name.endswith(SUFFIX) or "\0" in name:
        raise ValueError(f"{what} names {_short(name)}; expected the plain name of a {SUFFIX} file beside it")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def check_named_files(source: str | os.PathLike, options: Mapping[str, Any]) -> None:
    """Check the names of the weight files that a model is about to be loaded from, before any is taken or opened.

    Args:
        source: a folder or the name of a Hub repository.
        options: those of `from_pretrained`.

    Raises:
        ValueError: the index of weight files, or `transformers_weights` of the configuration, names something else
            than safetensors files beside it.
        OSError: the Hub is out of reach, and the cache does not hold the model.
    """
    if os.path.isfile(source):
        return
    places = {name: options[name] for name in PLACES if options.get(name) is not None}
    places["_raise_exceptions_for_missing_entries"] = False
    named = _named_weights(source, options, places)
    if named is not None:
        check_plain_name(named, f"transformers_weights in the configuration of {source}")
        return
    index, whole = (_with_variant(n, options.get("variant")) for n in (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME))
    try:
        file = cached_file(source, index, _raise_exceptions_for_gated_repo=False, **places)
    except OSError:
        cache_only = {**places, "local_files_only": True, "force_download": False}
        if cached_file(source, whole, _raise_exceptions_for_connection_errors=False, **cache_only) is None:
            raise
        return  # one file in the cache is what will be loaded
    if file is None:
        return
    folder = Path(file).parent
    for name in index_names(file, f"{index} of {source}"):
        # an index that an earlier save left beside the whole file is not read: what it names may be gone
        if os.path.isdir(source) and not (folder / name).is_file() and not (folder / whole).is_file():
            raise ValueError(f"{index} of {source} names {name!r}, which is not there; expected a listed file")


def _named_weights(source: str | os.PathLike, options: Mapping[str, Any], places: dict[str, Any]) -> object:
    """The file that the configuration has Transformers read in place of model.safetensors; None: none."""
    if "transformers_weights" in options:
        return options["transformers_weights"]
    config = options.get("config")
    if config is not None and not isinstance(config, (str, os.PathLike)):
        return getattr(config, "transformers_weights", None)
    source = source if config is None else config
    file = source if os.path.isfile(source) else cached_file(source, "config.json", **places)
    return None if file is None else read_json(file).get("transformers_weights")


def _with_variant(name: str, variant: str | None) -> str:
    """As Transformers names the files of a variant: model.fp16.safetensors, model.safetensors.index.fp16.json."""
    stem, _, ending = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{ending}"


class CheckpointMismatchError(ValueError, RuntimeError):
    """The tensors of a checkpoint do not fit the model.

    A ValueError as for every wrong value here, and a RuntimeError because Transformers raises one for wrong shapes.
    """


def misfits(model: nn.Module, info: dict, head_prefixes: tuple[str, ...], replace_mismatched: bool) -> list[str]:
    """What does not fit, in words; empty if all is well.

    Args:
        model: the loaded model; its configuration names the class that was saved, in `architectures`.
        info: the loading info of `from_pretrained`.
        head_prefixes: how the tensors of any head begin. This model's own may be missing where another class was
            saved: they are new. Those of heads it does not have are superfluous.
        replace_mismatched: whether tensors of another shape were to be replaced by new ones.
    """
    own_heads = tuple(prefix for prefix in head_prefixes if hasattr(model, prefix.removesuffix(".")))
    other_heads = tuple(prefix for prefix in head_prefixes if prefix not in own_heads)
    has_new_head = type(model).__name__ not in (model.config.architectures or ())
    excused = {"missing": own_heads if has_new_head else (), "unexpected": other_heads}
    problems = []
    for kind, prefixes in excused.items():
        names = sorted(name for name in info[f"{kind}_keys"] if not name.startswith(prefixes))
        if names:
            problems.append(f"{len(names)} {kind} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})")
    for name, stored, expected in sorted(info["mismatched_keys"]):
        if not replace_mismatched:
            problems.append(f"{name} is {tuple(stored)}, expected {tuple(expected)}")
    return problems
