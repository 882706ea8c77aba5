#!/usr/bin/env python
"""The whole way on one machine without network: text, tokenizer, pretraining, fine-tuning, use.

    python scripts/demo.py

The text is the documentation of the installed Python and its packages; a few minutes on two CPU cores.
"""

import json
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, PreTrainedModel, pipeline

from fastbert_hf.cli import glue, pretrain, tokenizer
from fastbert_hf.cli.arguments import RecipeArgumentParser, run_command
from fastbert_hf.data.build_corpus import is_held_out
from fastbert_hf.data.documentation import Document, documentation_corpus
from fastbert_hf.files import check_output_folder, write_text

HELD_OUT_SHARE = 0.05  # of source files: their text is in neither training part
CLASSES = 6  # packages to tell apart
CLASS_LIMIT = 1000  # training examples per package
SENTENCE_CHARACTERS = 240


@dataclass
class DemoArguments:
    """Options of the demonstration."""

    output_dir: str = field(default="runs/demo", metadata={"help": "everything is written here"})
    megabytes: float = field(default=12.0, metadata={"help": "millions of characters of documentation"})
    max_steps: int | None = field(default=None, metadata={"help": "other number of pretraining steps"})
    wanted_nats: float = field(default=1.0, metadata={"help": "how far under the unigram loss pretraining must get"})
    threads: int = field(
        default=1,
        metadata={"help": "CPU threads; more help only on an idle machine, where others compute they wait in turns"},
    )
    quick: bool = field(default=False, metadata={"help": "a few steps on little text: shows that everything runs"})
    progress: bool = field(default=True, metadata={"help": "show progress bars"})


def library_task(documents: list[Document]) -> dict[str, list[dict]]:
    """Make a GLUE-format task from the corpus: which package does this documentation belong to?

    Texts that name one of the packages are left out, so that the answer is not in the question. Validation rows
    come from held-out source files.

    Args:
        documents: the corpus.

    Returns:
        {"train": rows, "validation": rows}, rows as {"sentence", "label", "idx"}.
    """
    classes = [name for name, _ in Counter(document.package for document in documents).most_common(CLASSES)]
    rows: dict[str, list[dict]] = {"train": [], "validation": []}
    used: dict[tuple[str, str], int] = defaultdict(int)
    for document in documents:
        sentence = document.text[:SENTENCE_CHARACTERS]
        if document.package not in classes or any(name in sentence.lower() for name in classes):
            continue
        split = "validation" if is_held_out(document.file, HELD_OUT_SHARE) else "train"
        if used[split, document.package] < CLASS_LIMIT:
            used[split, document.package] += 1
            rows[split].append({"sentence": sentence, "label": document.package, "idx": len(rows[split])})
    return rows


def write_corpus(folder: Path, options: DemoArguments) -> dict[str, Path]:
    """Extract the documentation and write text and task files.

    Args:
        folder: where to.
        options: how much.

    Returns:
        {"train", "validation", "task_train", "task_validation"} -> file.
    """
    documents = documentation_corpus(1.0 if options.quick else options.megabytes, progress=options.progress)
    texts: dict[str, list[str]] = {"train": [], "validation": []}
    for document in documents:
        texts["validation" if is_held_out(document.file, HELD_OUT_SHARE) else "train"].append(document.text)
    files = {}
    for split, lines in texts.items():
        files[split] = folder / f"{split}.txt"
        write_text(files[split], "\n".join(lines) + "\n")
    for split, rows in library_task(documents).items():
        files[f"task_{split}"] = folder / "library" / f"{split}.jsonl"
        write_text(files[f"task_{split}"], "".join(json.dumps(row) + "\n" for row in rows))
    return files


def neurons_used(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> tuple[int, int, float]:
    """Count the neurons that tokens really visit.

    Args:
        model: a FastBERT model.
        inputs: a batch.

    Returns:
        Neurons one token uses in a layer, neurons a layer holds, and the mean number that the whole batch uses.
    """
    visited: list[torch.Tensor] = []
    layers = [module for module in model.modules() if hasattr(module, "route")]
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args: visited.append(layer.route(args[0]))) for layer in layers
    ]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    # (B, T, P, D+1) -> (N, P, D+1): nodes are numbered inside their tree, so trees are counted apart.
    per_layer = [nodes.flatten(0, -3) for nodes in visited]
    per_token = {sum(len(tree.unique()) for tree in token) for nodes in per_layer for token in nodes[:8]}
    per_batch = [sum(len(nodes[:, tree].unique()) for tree in range(nodes.shape[1])) for nodes in per_layer]
    return max(per_token), len(layers[0].weight_in), sum(per_batch) / len(per_batch)


def check_reload(model: PreTrainedModel, folder: Path, inputs: dict[str, torch.Tensor]) -> None:
    """Load the saved folder through the Auto classes and compare with the model that was trained.

    Args:
        model: the model in memory.
        folder: where it was saved.
        inputs: a batch.

    Raises:
        ValueError: if any weight differs, or any output by more than rounding.
    """
    model = model.eval().cpu()
    loaded, encoder = (cls.from_pretrained(folder).eval() for cls in (AutoModelForMaskedLM, AutoModel))
    if not all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items()):
        raise ValueError(f"the model loaded from {str(folder)!r} has other weights than the trained one")
    with torch.no_grad():
        pairs = (
            (loaded(**inputs).logits, model(**inputs).logits),
            (encoder(**inputs).last_hidden_state, model.base_model(**inputs).last_hidden_state),
        )
    # equal weights in other places of the memory may round matrix products differently
    if not all(torch.allclose(value, expected, atol=1e-5) for value, expected in pairs):
        raise ValueError(f"the model loaded from {str(folder)!r} gives other outputs than the trained one")


def pretrain_arguments(options: DemoArguments, folder: Path, files: dict[str, Path]) -> list[str]:
    """The command line of the pretraining step."""
    argv = ["--config", "pretrain/demo"]
    argv += ["--model_config", "model/small-1x9"]
    argv += ["--tokenizer_name", str(folder / "tokenizer"), "--output_dir", str(folder / "pretrained")]
    argv += ["--train_file", str(files["train"]), "--validation_file", str(files["validation"])]
    argv += ["--overwrite_output_dir", "--disable_tqdm", str(not options.progress)]
    if options.quick:
        argv += ["--max_steps", "10", "--per_device_train_batch_size", "8", "--max_eval_samples", "32"]
    if options.max_steps is not None:
        argv += ["--max_steps", str(options.max_steps)]
    return argv


def glue_arguments(options: DemoArguments, folder: Path, files: dict[str, Path]) -> list[str]:
    """The command line of the fine-tuning step."""
    argv = ["--config", "glue/demo", "--model_name_or_path", str(folder / "pretrained")]
    argv += ["--train_file", str(files["task_train"]), "--validation_file", str(files["task_validation"])]
    argv += ["--output_dir", str(folder / "library-classifier"), "--disable_tqdm", str(not options.progress)]
    argv += ["--overwrite_output_dir"]
    if options.quick:
        argv += ["--num_train_epochs", "1", "--max_train_samples", "64"]
    return argv


def use_model(model: PreTrainedModel, folder: Path) -> list[str]:
    """Reload the pretrained folder, fill a mask, count neurons; returns lines for the summary."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    fill = pipeline("fill-mask", model=str(folder), tokenizer=tokenizer)
    sentence = f"Returns the number of {tokenizer.mask_token} in the array."
    words = ", ".join(f"{answer['token_str']} {answer['score']:.2f}" for answer in fill(sentence, top_k=3))
    inputs = tokenizer(
        [sentence, "Parse the arguments and return a list of strings."], padding=True, return_tensors="pt"
    )
    check_reload(model, folder, dict(inputs))
    used, held, batch = neurons_used(model, dict(inputs))
    return [
        f"fill-mask        {sentence!r}: {words}",
        f"neurons          {used} of {held} per token and layer; the {inputs['input_ids'].numel()} tokens of two "
        f"sentences together {batch:.0f}",
        "loaded back      AutoModelForMaskedLM and AutoModel have the trained weights and give its outputs",
    ]


def peak_gigabytes() -> float:
    """Most resident memory this process has had, in 10^9 bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def main(argv: list[str] | None = None) -> list[str]:
    """Run everything; returns the summary's lines.

    Raises:
        ValueError: if the held-out loss is not `wanted_nats` under the unigram loss (not asked of --quick).
    """
    (options,) = RecipeArgumentParser(DemoArguments, extra="training", description=__doc__).parse(argv)
    folder = check_output_folder(options.output_dir)
    if options.threads < 1:
        raise ValueError(f"threads must be at least 1; got {options.threads}")
    torch.set_num_threads(options.threads)
    start = time.perf_counter()
    files = write_corpus(folder, options)
    size = (files["train"].stat().st_size + files["validation"].stat().st_size) / 1e6
    words = ["--train_file", str(files["train"]), "--output_dir", str(folder / "tokenizer")]
    tokenizer.main([*words, "--vocab_size", "4096"])
    model, pretrained = pretrain.main(pretrain_arguments(options, folder, files))
    (tuned,) = glue.main(glue_arguments(options, folder, files))
    lines = [
        f"corpus           {size:.1f} MB of documentation strings, {HELD_OUT_SHARE:.0%} of source files held out",
        f"pretraining      {pretrained['parameters'] / 1e6:.2f} M parameters, "
        f"{pretrained['tokens_seen'] / 1e6:.1f} M tokens in {pretrained['train_seconds']:.0f} s",
        f"MLM loss         {pretrained['validation_loss']:.3f} nats on held-out text; "
        f"unigram baseline {pretrained['unigram_loss']:.3f}",
        f"which library?   accuracy {tuned['accuracy']:.3f} on {tuned['examples']} held-out texts; "
        f"always the most frequent {tuned['majority_accuracy']:.3f}",
        *use_model(model, folder / "pretrained"),
        f"time             {time.perf_counter() - start:.0f} s; peak memory {peak_gigabytes():.2f} GB",
    ]
    print("\n" + "\n".join(lines))
    if not options.quick and pretrained["nats_under_unigram"] < options.wanted_nats:
        raise ValueError(
            f"the held-out loss is {pretrained['nats_under_unigram']:.2f} nats under the unigram baseline; "
            f"wanted at least {options.wanted_nats}"
        )
    return lines


if __name__ == "__main__":
    sys.exit(run_command(main))
