#!/usr/bin/env python
"""The command `fastbert quantize` as a script."""

import sys

from fastbert_hf.cli.arguments import run_command
from fastbert_hf.cli.quantize import main

if __name__ == "__main__":
    sys.exit(run_command(main))
