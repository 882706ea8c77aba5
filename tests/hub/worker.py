"""Runs scripts and snippets named on standard input, one JSON line each, and answers with what they printed."""

import contextlib
import importlib
import io
import json
import logging
import os
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]


def run(request: dict) -> int:
    from fastbert_hf.cli.arguments import run_command

    if "code" in request:
        exec(compile(request["code"], "snippet", "exec"), {"__name__": "snippet"})
        return 0
    module = importlib.import_module(request["script"])
    return run_command(lambda: module.main(request["argv"]))


def main() -> None:
    answers = sys.stdout
    for line in sys.stdin:
        request = json.loads(line)
        os.environ.pop("HF_TOKEN", None)
        if request["token"]:
            os.environ["HF_TOKEN"] = request["token"]
        out, err = io.StringIO(), io.StringIO()
        handler = logging.StreamHandler(err)  # what any library logs is looked at too
        logging.getLogger().addHandler(handler)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = run(request)
            except BaseException:
                traceback.print_exc(file=err)
                code = 1
        logging.getLogger().removeHandler(handler)
        answers.write(json.dumps({"code": code, "out": out.getvalue(), "err": err.getvalue()}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
