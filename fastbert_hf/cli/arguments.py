"""Command lines with YAML recipes: `--config RECIPE` first, then overrides; the last value wins."""

import argparse
import gc
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser

from fastbert_hf.extras import MissingExtraError, require_extra
from fastbert_hf.recipes import load_yaml

logger = logging.getLogger(__name__)


class RecipeArgumentParser(HfArgumentParser):
    """`HfArgumentParser` that understands `--config RECIPE` and raises instead of printing pages of usage.

    A recipe's entries become command-line tokens placed before the user's own, so argparse converts both in the
    same way and the command line wins.

    Args:
        dataclass_types: dataclasses whose fields are the options.
        extra: extra of the package without which the command cannot work; see `fastbert_hf.extras`.
        **kwargs: for `argparse.ArgumentParser`.
    """

    def __init__(self, dataclass_types, extra: str | None = None, **kwargs):
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)
        self.extra = extra
        self.add_argument(
            "--config",
            action="append",
            default=[],
            help="YAML file, or a recipe that comes with the package, e.g. pretrain/demo; options beside it win",
        )

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
            MissingExtraError: `extra` is not installed; --help works without it.
        """
        argv = list(sys.argv[1:] if argv is None else argv)
        if self.extra is not None and not {"-h", "--help"} & set(argv):
            require_extra(self.extra)
        finder = HfArgumentParser([], add_help=False, allow_abbrev=False)
        finder.add_argument("--config", action="append", default=[])
        files, _ = finder.parse_known_args(argv)
        tokens = [token for file in files.config for token in self.recipe_tokens(file)]
        parsed = self.parse_args_into_dataclasses([*tokens, *argv], look_for_args_file=False)
        return parsed[: len(self.dataclass_types)]

    def recipe_tokens(self, path: str | Path) -> list[str]:
        """Turn a recipe into command-line tokens.

        Args:
            path: YAML file, or name of a recipe, whose keys are option names without the dashes.

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
    """`ArgumentParser` for commands without recipes; it keeps the description's lines and raises like the above.

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
    """Run a command's main function; a user's mistake becomes one line instead of a traceback.

    A process group that training has opened is closed behind it.

    Args:
        main: function without arguments that raises ValueError for wrong input.

    Returns:
        Exit code: 0, or 2 after a ValueError or a missing extra. `--log_level debug` also prints the traceback.
    """
    try:
        main()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # Its threads end with the last reference. One that still lets go of a tensor while the interpreter ends
            # aborts the process: seen with gloo, once in a hundred runs on a busy machine.
            gc.collect()
            torch.distributed.destroy_process_group()
    except (ValueError, MissingExtraError) as error:
        logger.debug("the error's origin", exc_info=True)
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the last checkpoint, if any, is in the output folder", file=sys.stderr)
        return 130
    return 0
