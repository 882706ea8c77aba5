"""`python -m fastbert_hf` is the command `fastbert`; torchrun starts several processes with `-m fastbert_hf`."""

import sys

from fastbert_hf.cli.main import run

if __name__ == "__main__":
    sys.exit(run())
