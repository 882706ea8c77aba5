"""Print which backends of each op run on this machine and how, and why the others do not."""

from fastbert_hf.cli.arguments import CommandParser
from fastbert_hf.kernels.__main__ import main as print_backends


def main(argv: list[str] | None = None) -> None:
    """Parse, print."""
    CommandParser(prog="fastbert kernels", description=__doc__).parse_args(argv)
    print_backends()
