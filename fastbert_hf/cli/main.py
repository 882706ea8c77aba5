"""The command `fastbert`: finds the subcommand and imports no other."""

import importlib
import sys

import fastbert_hf
from fastbert_hf.cli.arguments import CommandParser, run_command

# words of the subcommand -> module of this package, and what it does
COMMANDS = {
    "prepare": ("prepare", "turn raw text into a corpus for pretraining"),
    "tokenizer": ("tokenizer", "train a WordPiece tokenizer"),
    "pretrain": ("pretrain", "pretrain a masked language model"),
    "compare": ("compare", "compare finished pretraining runs"),
    "glue": ("glue", "fine-tune and evaluate classifiers on GLUE tasks or own data"),
    "glue compare": ("compare_glue", "compare fine-tuned students with their dense original"),
    "distill": ("distill", "make a model that you have faster: trees in place of its feed-forward layers"),
    "distill compare": ("compare_distilled", "compare distilled models: quality beside speed"),
    "distill fit-layers": ("fit_layers", "fit trees to a dense layer of a trained model"),
    "look": ("look", "make a page that shows which way tokens take through a model's trees"),
    "quantize": ("quantize", "prepare a model to be served from a CPU, with int8 or bfloat16 weights"),
    "push": ("push", "push a model folder to the Hub"),
    "pull": ("pull", "take a model from the Hub"),
    "benchmark": ("benchmark", "measure this machine"),
    "kernels": ("kernels", "print which kernels run on this machine"),
}
DESCRIPTION = """FastBERT: prepare text, pretrain, fine-tune, share and measure.

{commands}

`fastbert COMMAND --help` explains the options of a command. --config takes a YAML file or the name of a recipe that
comes with the package, e.g. --config pretrain/cpu-10-minutes."""


def main(argv: list[str]) -> None:
    """Run one subcommand.

    Args:
        argv: words of the subcommand, then its options.

    Raises:
        ValueError: for an unknown subcommand.
    """
    for words in sorted(COMMANDS, key=len, reverse=True):  # "distill fit-layers" before "distill"
        module, _ = COMMANDS[words]
        count = len(words.split())
        if " ".join(argv[:count]) == words:
            importlib.import_module(f"fastbert_hf.cli.{module}").main(argv[count:])
            return
    listed = "\n".join(f"  {words:20}{purpose}" for words, (_, purpose) in COMMANDS.items())
    parser = CommandParser(
        prog="fastbert", usage="fastbert COMMAND [options]", description=DESCRIPTION.format(commands=listed)
    )
    parser.add_argument("--version", action="version", version=fastbert_hf.__version__)
    parser.add_argument("command", nargs="*", help="one of the above")
    words = " ".join(parser.parse_known_args(argv)[0].command[:2])
    raise ValueError(f"{f'unknown command {words!r}' if words else 'no command'}; expected {', '.join(COMMANDS)}")


def run() -> int:
    """Run the command line of this process; returns its exit code."""
    return run_command(lambda: main(sys.argv[1:]))
