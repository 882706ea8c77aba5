"""Command lines with YAML recipes: `--config FILE.yaml` first, then overrides; the last value wins."""

import argparse
import gc
import json
import logging
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import HfArgumentParser

logger = logging.getLogger(__name__)


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 5e-5 as a number, which YAML 1.1 does only with a dot, and rejects repeated keys."""

    def compose_mapping_node(self, anchor):
        """Compare keys as written: merge keys (<<) later put entries beside those that override them."""
        node = super().compose_mapping_node(anchor)
        keys = [(key.tag, key.value) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.composer.ComposerError(None, None, f"key {key[1]!r} appears twice", node.start_mark)
        return node

    def flatten_mapping(self, node):
        """Replace << by what it names, each key once: own entries win, then earlier mappings of a merge list.

        PyYAML's own way leaves keys several times; from 6.0.4 on, a merged mapping that itself merges others then
        passes on what it has overridden.
        """
        merged, own = [], []
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                merged += value.value if isinstance(value, yaml.SequenceNode) else [value]
            else:
                own.append((key, value))
        node.value = own  # from here on, so that a mapping that merges itself ends
        for mapping in merged:
            if not isinstance(mapping, yaml.MappingNode):
                message = f"<< takes a mapping or a list of mappings; got a {mapping.id}"
                raise yaml.constructor.ConstructorError(None, None, message, mapping.start_mark)
            self.flatten_mapping(mapping)
            known = [(key.tag, key.value) for key, _ in own]
            own += [(key, value) for key, value in mapping.value if (key.tag, key.value) not in known]


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a recipe.

    Args:
        path: a YAML file that holds one mapping.

    Returns:
        The mapping.

    Raises:
        ValueError: if the file is missing, is not YAML, repeats a key or is not a mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"recipe file {str(path)!r} does not exist")
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.load(file, Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe file {str(path)!r} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"recipe file {str(path)!r} must hold 'key: value' lines; got {type(content).__name__}")
    return content


class RecipeArgumentParser(HfArgumentParser):
    """`HfArgumentParser` that understands `--config FILE.yaml` and raises instead of printing pages of usage.

    A recipe's entries become command-line tokens placed before the user's own, so argparse converts both in the
    same way and the command line wins.

    Args:
        dataclass_types: dataclasses whose fields are the options.
        **kwargs: for `argparse.ArgumentParser`.
    """

    def __init__(self, dataclass_types, **kwargs):
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)
        self.add_argument("--config", action="append", default=[], help="YAML recipe; options given beside it win")

    def error(self, message: str):
        """Called by argparse for a bad command line.

        Raises:
            ValueError: always, with argparse's message.
        """
        raise ValueError(message)

    def parse(self, argv: Sequence[str] | None = None) -> tuple:
        """Parse recipes and command line.

        Args:
            argv: arguments without the program's name; default `sys.argv[1:]`.

        Returns:
            One instance of each dataclass, in order.

        Raises:
            ValueError: for an unknown option or recipe key, a value of the wrong type, or a bad recipe file.
        """
        argv = list(sys.argv[1:] if argv is None else argv)
        finder = HfArgumentParser([], add_help=False, allow_abbrev=False)
        finder.add_argument("--config", action="append", default=[])
        files, _ = finder.parse_known_args(argv)
        tokens = [token for file in files.config for token in self.recipe_tokens(file)]
        parsed = self.parse_args_into_dataclasses([*tokens, *argv], look_for_args_file=False)
        return parsed[: len(self.dataclass_types)]

    def recipe_tokens(self, path: str | Path) -> list[str]:
        """Turn a recipe into command-line tokens.

        Args:
            path: YAML file whose keys are option names without the dashes.

        Returns:
            Tokens in file order; entries without a value are left out.

        Raises:
            ValueError: for a key that is no option, naming the key and the file, or a bad file.
        """
        tokens = []
        for key, value in load_yaml(path).items():
            option = f"--{key}"
            if option not in self._option_string_actions or key in ("config", "help"):
                raise ValueError(f"recipe file {str(path)!r} has an unknown key {key!r}")
            if value is None:
                continue
            if isinstance(value, list) and len(value) != 1:
                tokens += [option, *map(str, value)]
                continue
            (value,) = value if isinstance(value, list) else (value,)
            # One token: a value that begins with a dash is not an option.
            tokens.append(f"{option}={json.dumps(value) if isinstance(value, dict) else value}")
        return tokens


class CommandParser(argparse.ArgumentParser):
    """`ArgumentParser` for scripts without recipes; it keeps the description's lines and raises like the above.

    Args:
        **kwargs: for `argparse.ArgumentParser`.
    """

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str):
        """Called by argparse for a bad command line.

        Raises:
            ValueError: always, with argparse's message.
        """
        raise ValueError(message)


def run_command(main: Callable[[], Any]) -> int:
    """Run a script's main function; a user's mistake becomes one line instead of a traceback.

    A process group that training has opened is closed behind it.

    Args:
        main: function without arguments that raises ValueError for wrong input.

    Returns:
        Exit code: 0, or 2 after a ValueError. `--log_level debug` also prints the traceback.
    """
    try:
        main()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # Its threads end with the last reference. One that still lets go of a tensor while the interpreter ends
            # aborts the process: seen with gloo, once in a hundred runs on a busy machine.
            gc.collect()
            torch.distributed.destroy_process_group()
    except ValueError as error:
        logger.debug("the error's origin", exc_info=True)
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the last checkpoint, if any, is in the output folder", file=sys.stderr)
        return 130
    return 0
