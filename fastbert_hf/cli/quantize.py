"""Prepare a model to be served from a CPU, and measure what that is worth and what it costs.

    fastbert quantize runs/fast-minilm --dtype int8 --output_dir runs/fast-minilm-int8 --eval_file validation.jsonl

The folder loads prepared with from_pretrained, a pipeline or SentenceTransformer. Speed is that of this machine, one
thread, both models in turns.
"""

import copy
import json
from pathlib import Path
from typing import Any

import fastbert_hf  # noqa: F401  registers the model with the Auto classes
from fastbert_hf.benchmarks.machine import processor_name
from fastbert_hf.benchmarks.prepared import PREPARED, compare_prepared, render
from fastbert_hf.cli.arguments import CommandParser
from fastbert_hf.extras import require_extra
from fastbert_hf.files import write_text
from fastbert_hf.inference_fastbert import DTYPES
from fastbert_hf.quantizer_fastbert import prepare_for_inference
from fastbert_hf.training.distillation.scores import check_labelled
from fastbert_hf.training.distillation.teacher import copy_embedder, load_model


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Parse, prepare, save, measure; returns what was measured.

    Raises:
        ValueError: no such model, one that is prepared already, an output folder that is the model's, or a file that
            cannot be scored.
    """
    parser = CommandParser(prog="fastbert quantize", description=__doc__)
    parser.add_argument("model", help="a folder, or NAMESPACE/NAME on the Hub")
    parser.add_argument("--output_dir", required=True, help="folder for the prepared model")
    parser.add_argument("--dtype", choices=DTYPES, default="int8", help="of trees and linear layers; default: int8")
    parser.add_argument("--linear_dtype", choices=DTYPES, help="of the linear layers, where it is another")
    parser.add_argument("--eval_file", help="labelled texts: .jsonl, .csv, .tsv or .parquet; scored before and after")
    parser.add_argument("--rounds", type=int, default=15, help="of the timing; 0 leaves it out; default: 15")
    options = parser.parse_args(argv)
    if options.rounds < 0:
        raise ValueError(f"rounds is {options.rounds}; expected 0 or more")
    if options.eval_file is not None:
        require_extra("training", "scipy")
    source = load_model(options.model)
    folder = Path(options.output_dir)
    if folder.resolve() == source.folder.resolve():
        raise ValueError(f"--output_dir is the folder of the model, {options.model!r}; expected another one")
    if source.model.is_prepared:
        raise ValueError(f"{options.model!r} is prepared for inference already; expected the float model")
    if options.eval_file is not None:
        check_labelled(options.eval_file, source)
    prepared = prepare_for_inference(copy.deepcopy(source.model), options.dtype, options.linear_dtype)
    prepared.save_pretrained(folder)
    source.tokenizer.save_pretrained(folder)
    copy_embedder(source.folder, folder)
    found = compare_prepared(source, prepared, options.eval_file, options.rounds) | {"machine": processor_name()}
    write_text(folder / PREPARED, json.dumps(found, indent=2) + "\n")
    print(render(found))
    print(f"in {folder}")
    return found
