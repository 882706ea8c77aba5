"""Measure FastBERT on this machine: the paper's comparison of feed-forward layers, then whole models.

Every figure stands beside its baseline, measured in turns in the same run, and its result is checked against the
reference first. Tables go to the terminal, JSON, Markdown and plots to --output_dir, after every section: started
again, an interrupted run goes on with the sections that are missing there.
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch

from fastbert_hf.benchmarks.machine import describe
from fastbert_hf.benchmarks.serving.section import ServingOptions
from fastbert_hf.benchmarks.serving.subjects import GEOMETRIES
from fastbert_hf.benchmarks.suite import PLOTS, QUICK_SECTIONS, SECTIONS, Options, run
from fastbert_hf.cli.arguments import CommandParser
from fastbert_hf.extras import require_extra


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = CommandParser(prog="fastbert benchmark", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the sections and sizes that take three minutes")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, help="default: all, or the quick ones")
    parser.add_argument("--threads", nargs="+", type=int, help="thread counts; default: 1 and all")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--fresh", action="store_true", help="measure again what output_dir holds from before")
    parser.add_argument("--trained_model", help="folder of a trained FastBERT with its tokenizer, for --text")
    parser.add_argument("--text", help="text file whose paths through the trained model are measured")
    serving = parser.add_argument_group("section serving", "default: models of random weights in two geometries")
    serving.add_argument("--original", help="folder of a BERT, to serve beside models distilled from it")
    serving.add_argument("--runs", nargs="+", default=[], help="folders of models that were distilled from it")
    serving.add_argument("--eval_file", help="labelled pairs of texts: quality beside speed")
    serving.add_argument("--sentences", help="text file, a sentence a line, to time; default: those of eval_file")
    serving.add_argument("--entries", default="", help="a regular expression: those alone whose names match")
    serving.add_argument(
        "--geometries", nargs="+", default=[], choices=GEOMETRIES, help="of random weights; default: all"
    )
    arguments = parser.parse_args(argv)
    if bool(arguments.trained_model) != bool(arguments.text):
        parser.error("--trained_model and --text go together")
    if (arguments.runs or arguments.eval_file or arguments.sentences) and not arguments.original:
        parser.error("--runs, --eval_file and --sentences need --original")
    if arguments.original and not (arguments.eval_file or arguments.sentences):
        parser.error("--original needs --eval_file or --sentences: texts to time with")
    if arguments.original and arguments.geometries:
        parser.error("--geometries are of random weights; --original is a model")
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Parse, measure, report; the exit code is 1 where a timed result is wrong."""
    arguments = parse(argv)
    threads = arguments.threads or sorted({1, torch.get_num_threads()})
    sections = arguments.sections or (QUICK_SECTIONS if arguments.quick else list(SECTIONS))
    if not arguments.trained_model:
        sections = [name for name in sections if name != "routing"]
    if "gpu" in sections and not torch.cuda.is_available():
        print("no GPU that torch can use: the section gpu is left out")
        sections = [name for name in sections if name != "gpu"]
    if PLOTS.keys() & set(sections) or (arguments.original and "serving" in sections):
        require_extra("bench", "matplotlib")
    if arguments.fresh:
        shutil.rmtree(arguments.output_dir, ignore_errors=True)
    names = ("original", "runs", "eval_file", "sentences", "entries", "geometries")
    serving = ServingOptions(**{name: getattr(arguments, name) for name in names})
    options = Options(threads, sections, arguments.quick, arguments.trained_model, arguments.text, serving)
    machine = describe(threads)
    print(machine, flush=True)
    measured = run(options, machine, arguments.output_dir, lambda text: print(text, flush=True))
    print(f"\nwritten to {arguments.output_dir}")
    wrong = [row for row in [*measured.rows, *measured.serving] if "MISMATCH" in row.match]
    if wrong:
        sys.exit(f"{len(wrong)} timed results do not match the reference")
