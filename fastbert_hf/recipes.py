"""Recipes: YAML files with settings, found by name from any folder."""

import difflib
import re
from pathlib import Path
from typing import Any

import yaml

PACKAGE = Path(__file__).resolve().parent
# an installed package holds the recipes itself; a checkout, editable or not, has them beside the package
FOLDER = next((folder for folder in (PACKAGE / "configs", PACKAGE.parent / "configs") if folder.is_dir()), None)


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 5e-5 as a number, which YAML 1.1 does only with a dot, and rejects repeated keys."""

    def compose_mapping_node(self, anchor):
        """Reject what would hide one value behind another: a key that appears twice, and merge keys (<<)."""
        node = super().compose_mapping_node(anchor)
        keys = [(key.tag, key.value) for key, _ in node.value]
        for key in keys:
            if key[0] == "tag:yaml.org,2002:merge":
                raise yaml.composer.ComposerError(None, None, "merge keys (<<) are not supported", node.start_mark)
            if keys.count(key) > 1:
                raise yaml.composer.ComposerError(None, None, f"key {key[1]!r} appears twice", node.start_mark)
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package, e.g. "pretrain/cpu-10-minutes"."""
    if FOLDER is None:
        return []
    return sorted(file.relative_to(FOLDER).with_suffix("").as_posix() for file in FOLDER.rglob("*.yaml"))


def find_recipe(name: str | Path) -> Path:
    """Find a recipe: a file where one is, otherwise a recipe that comes with the package.

    Args:
        name: a path, or a name such as "pretrain/cpu-10-minutes"; "configs/pretrain/cpu-10-minutes.yaml" is the same.

    Returns:
        The file.

    Raises:
        ValueError: if there is neither; the nearest names are in the message.
    """
    if Path(name).is_file():
        return Path(name)
    known = recipe_names()
    short = Path(name).as_posix().removeprefix("configs/").removesuffix(".yaml")
    if short in known:
        return FOLDER / f"{short}.yaml"
    near = difflib.get_close_matches(short, known, n=3) or sorted({f"{name.partition('/')[0]}/..." for name in known})
    raise ValueError(
        f"recipe file {str(name)!r} does not exist, and no recipe that comes with the package has that name; "
        f"expected a file or a name such as {', '.join(near)}"
    )


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a recipe.

    Args:
        path: a YAML file that holds one mapping, or the name of a recipe; see `find_recipe`.

    Returns:
        The mapping.

    Raises:
        ValueError: if the file is missing, is not YAML, repeats or merges keys, or is not a mapping.
    """
    path = find_recipe(path)
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.load(file, Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe file {str(path)!r} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"recipe file {str(path)!r} must hold 'key: value' lines; got {type(content).__name__}")
    return content
