"""The sections of the benchmark, in order, and the report they end in."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForMaskedLM

from fastbert_hf.benchmarks import gpu, int8, layer, leaves, models
from fastbert_hf.benchmarks.headline import format_headline
from fastbert_hf.benchmarks.memory import MemoryRow, format_memory, memory_rows
from fastbert_hf.benchmarks.plots import plot_serving, plot_speedup_against_depth, plot_time_per_token
from fastbert_hf.benchmarks.routing import RoutingChange, format_routing, routing_changes, text_batch
from fastbert_hf.benchmarks.rows import Row, format_table
from fastbert_hf.benchmarks.serving.rows import ServingRow, comparable, format_serving
from fastbert_hf.benchmarks.serving.section import ServingOptions, serving_rows
from fastbert_hf.fff_layer import FastFeedForward
from fastbert_hf.hub.weights import check_weights
from fastbert_hf.training.module_inputs import watched_inputs

PAPER_GRID = [(3072, 0), (1536, 1), (512, 2), (256, 3), (128, 4), (64, 5), (32, 6), (16, 7), (8, 8), (4, 9), (2, 10)]


@dataclass
class Options:
    """What to run.

    Args:
        threads: thread counts. sections: names out of `SECTIONS`. quick: the version of three minutes.
        trained_model, text: a folder with a FastBERT and its tokenizer, and a text file: adds the paths of real text.
        serving: what the section of that name measures.
    """

    threads: list[int]
    sections: list[str]
    quick: bool = False
    trained_model: str | None = None
    text: str | None = None
    serving: ServingOptions = field(default_factory=ServingOptions)

    @property
    def rounds(self) -> int:
        return 5 if self.quick else 7


def forward_section(options: Options, ceilings: dict) -> Iterator[list[Row]]:
    sizes = (1, 128, 2048) if options.quick else (1, 16, 128, 512, 1024, 2048, 4096, 16384)
    for threads in options.threads:
        for tokens in sizes:
            yield layer.forward_rows(
                tokens, threads, ceilings[threads], rounds=options.rounds, compile_dense=tokens <= 4096
            )


def bfloat16_section(options: Options, ceilings: dict) -> Iterator[list[Row]]:
    for threads in options.threads:
        for tokens in (2048,) if options.quick else (1, 128, 2048, 16384):
            for dtype in (torch.float32, torch.bfloat16):
                yield layer.forward_rows(
                    tokens,
                    threads,
                    ceilings[threads],
                    dtype=dtype,
                    section="bfloat16",
                    rounds=options.rounds,
                    compile_dense=False,
                )


def paths_section(options: Options, ceilings: dict) -> Iterator[list[Row]]:
    tokens = 2048
    for threads in options.threads:
        for kind in ("balanced", "one path"):
            yield layer.forward_rows(
                tokens,
                threads,
                ceilings[threads],
                kind=kind,
                section="paths",
                rounds=options.rounds,
                compile_dense=False,
            )
        if options.trained_model and options.text:
            problem = trained_problem(options.trained_model, options.text, tokens)
            yield layer.forward_rows(
                problem.x.shape[0],
                threads,
                ceilings[threads],
                kind=f"text, trained model, H={problem.x.shape[1]}",
                section="paths",
                rounds=options.rounds,
                compile_dense=False,
                problem=problem,
            )


def trained_problem(folder: str, text: str, tokens: int) -> layer.LayerProblem:
    """The middle layer of a trained model and what real text feeds it.

    Raises:
        ValueError: damaged weights, or an index of them that leads out of the folder.
    """
    check_weights(folder)
    model = AutoModelForMaskedLM.from_pretrained(folder).eval()
    ids, _ = text_batch(folder, text, tokens)
    ffn = model.base_model.layers[model.config.num_hidden_layers // 2].ffn
    assert isinstance(ffn, FastFeedForward)
    seen: list[torch.Tensor] = []
    with torch.inference_mode(), watched_inputs([ffn], lambda _, x: seen.append(x.clone())):
        model(ids)
    return layer.LayerProblem(ffn, seen[0].flatten(0, 1).clone())


def depth_section(options: Options, ceilings: dict) -> Iterator[list[Row]]:
    for threads in options.threads:
        for depth in (3, 7, 11) if options.quick else (2, 4, 6, 8, 9, 10, 11, 12):
            yield layer.forward_rows(
                2048,
                threads,
                ceilings[threads],
                depth=depth,
                section="depth",
                rounds=options.rounds,
                compile_dense=False,
            )


def grid_section(options: Options, ceilings: dict) -> Iterator[list[Row]]:
    threads = max(options.threads)
    for trees, depth in [*PAPER_GRID, (1, 11)]:
        yield layer.forward_rows(
            256,
            threads,
            ceilings[threads],
            depth=depth,
            trees=trees,
            section="grid",
            rounds=5,
            compile_dense=False,
        )


def training_section(options: Options, ceilings: dict) -> Iterator[list[Row]]:
    for threads in options.threads:
        for tokens in (1024,) if options.quick else (128, 1024, 4096):
            yield layer.training_rows(tokens, threads, rounds=3 if options.quick else 5)


def models_section(options: Options, ceilings: dict) -> Iterator[list[Row]]:
    for threads in options.threads:
        for batch in (1, 8) if options.quick else (1, 8, 32):
            yield models.inference_rows(batch, 128, threads, rounds=3 if options.quick else 5)


def model_training_section(options: Options, ceilings: dict) -> Iterator[list[Row]]:
    threads = max(options.threads)
    for batch in (1,) if options.quick else (1, 32):
        yield models.training_rows(batch, 128, threads, rounds=1 if options.quick else 3)


def finetuning_section(options: Options, ceilings: dict) -> Iterator[list[Row]]:
    threads = max(options.threads)
    yield models.finetuning_rows(16, 128, threads, rounds=1 if options.quick else 3)
    yield models.inference_rows(32, 128, threads, rounds=3, classifier=True)


def alternatives_section(options: Options, ceilings: dict) -> Iterator[list[Row]]:
    for threads in options.threads:
        yield models.alternatives_rows(1, 128, threads)
    if not options.quick:
        yield models.alternatives_rows(8, 128, max(options.threads))


def leaves_section(options: Options, ceilings: dict) -> Iterator[list[Row]]:
    for threads in options.threads:
        for hidden in (384, 768):
            for tokens in (1, 128) if options.quick else (1, 128, 2048, 16384):
                yield leaves.forward_rows(hidden, tokens, threads, ceilings[threads], rounds=options.rounds)


def leaves_bfloat16_section(options: Options, ceilings: dict) -> Iterator[list[Row]]:
    for threads in options.threads:
        for tokens in (128,) if options.quick else (1, 128, 2048):
            for dtype in (torch.float32, torch.bfloat16):
                yield leaves.forward_rows(
                    768,
                    tokens,
                    threads,
                    ceilings[threads],
                    dtype=dtype,
                    section="leaf trees, bfloat16",
                    rounds=options.rounds,
                    compile_dense=False,
                )


def leaves_training_section(options: Options, ceilings: dict) -> Iterator[list[Row]]:
    for threads in options.threads:
        for tokens in (1024,) if options.quick else (128, 4096):
            yield leaves.training_rows(768, tokens, threads, rounds=3 if options.quick else 5)


def leaves_models_section(options: Options, ceilings: dict) -> Iterator[list[Row]]:
    for threads in options.threads:
        for batch, tokens in ((1, 128),) if options.quick else ((1, 16), (1, 128), (32, 64)):
            yield leaves.encoder_rows(batch, tokens, threads, rounds=3 if options.quick else 7)


def int8_section(options: Options, ceilings: dict) -> Iterator[list[Row]]:
    for threads in options.threads:
        for form, hidden in (("leaves", 384), ("leaves", 768), ("nodes", 768)):
            for tokens in (1, 128) if options.quick else (1, 2, 128, 2048, 16384):
                yield int8.forward_rows(form, hidden, tokens, threads, rounds=options.rounds)


SECTIONS: dict[str, Callable[[Options, dict], Iterator[list[Row]]]] = {
    "forward": forward_section,
    "bfloat16": bfloat16_section,
    "paths": paths_section,
    "depth": depth_section,
    "grid": grid_section,
    "training": training_section,
    "models": models_section,
    "model-training": model_training_section,
    "fine-tuning": finetuning_section,
    "alternatives": alternatives_section,
    "leaves": leaves_section,
    "leaves-bfloat16": leaves_bfloat16_section,
    "leaves-training": leaves_training_section,
    "leaves-models": leaves_models_section,
    "int8": int8_section,
    "gpu": lambda options, ceilings: gpu.gpu_rows() if torch.cuda.is_available() else iter(()),
    "memory": lambda options, ceilings: iter(()),  # not times: see `run`
    "routing": lambda options, ceilings: iter(()),  # likewise
    "serving": lambda options, ceilings: iter(()),  # rows of another kind
}
# sections with a picture, which matplotlib draws
PLOTS = {
    "forward": ("time-per-token.png", plot_time_per_token),
    "depth": ("speedup-depth.png", plot_speedup_against_depth),
}
SERVING_PLOT = "serving.png"
QUICK_SECTIONS = ["forward", "bfloat16", "training", "models", "memory"]


@dataclass
class Measurements:
    """Everything a run measured."""

    rows: list[Row] = field(default_factory=list)
    memory: list[MemoryRow] = field(default_factory=list)
    routing: list[RoutingChange] = field(default_factory=list)
    serving: list[ServingRow] = field(default_factory=list)
    sections: list[str] = field(default_factory=list)  # finished ones

    @classmethod
    def load(cls, folder: Path) -> "Measurements":
        """What an earlier, perhaps interrupted run left in `folder`; nothing if there was none."""
        path = folder / "results.json"
        if not path.exists():
            return cls()
        stored = json.loads(path.read_text(encoding="utf-8"))
        rows = [Row.from_dict(row) for row in stored["rows"]]
        memory = [MemoryRow(**row) for row in stored["memory"]]
        routing = [RoutingChange(**change) for change in stored["routing"]]
        serving = [ServingRow(**row) for row in stored.get("serving", ())]
        return cls(rows, memory, routing, serving, stored["sections"])

    def as_dict(self) -> dict:
        return {
            "sections": self.sections,
            "rows": [row.as_dict() for row in self.rows],
            "memory": [asdict(row) for row in self.memory],
            "routing": [asdict(change) for change in self.routing],
            "serving": [asdict(row) for row in self.serving],
        }

    def tables(self) -> str:
        parts = [(self.rows, format_table), (self.memory, format_memory), (self.routing, format_routing)]
        parts.append((self.serving, format_serving))
        tables = [format_headline(self.rows, self.memory), *(form(rows) for rows, form in parts if rows)]
        return "\n\n".join(tables) + "\n"


def run(options: Options, machine: dict, folder: Path, report: Callable[[str], None]) -> Measurements:
    """Run the sections that `folder` does not hold yet, reporting every group of rows as soon as it is measured.

    The report is written after every section, so that an interrupted run loses one section at most.
    """
    measured = Measurements.load(folder)
    ceilings = {int(threads): values for threads, values in machine["ceilings"].items()}
    for name in options.sections:
        if name in measured.sections:
            report(f"\n## {name}: measured before\n")
            continue
        report(f"\n## {name}\n")
        if name == "memory":
            measured.memory = memory_rows() + (gpu.memory_rows() if torch.cuda.is_available() else [])
            report(format_memory(measured.memory))
        elif name == "routing":
            measured.routing = routing_changes(options.trained_model, options.text)
            report(format_routing(measured.routing))
        elif name == "serving":
            measured.serving = []
            for group in serving_rows(options.serving, options.threads, options.quick, report):
                measured.serving += group
                report(format_serving(group))
        rows: list[Row] = []
        for group in SECTIONS[name](options, ceilings):
            rows += group
            report(format_table(group))
            if any(row.busy for row in group):
                report("warning: other processes kept this machine busy; rows marked (busy) are not to be quoted")
        measured.rows += rows
        measured.sections.append(name)
        write_report(measured, machine, folder)
    return measured


def write_report(measured: Measurements, machine: dict, folder: Path) -> None:
    """results.json, Markdown tables and the plots, written to temporary names and renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"machine": machine, **measured.as_dict()}, indent=1)
    for name, text in (("results.json", content), ("results.md", measured.tables())):
        temporary = folder / f".{name}"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(folder / name)
    for section, (name, plot) in PLOTS.items():
        if any(row.section == section for row in measured.rows):
            plot(measured.rows, folder / name)
    if comparable(measured.serving):
        plot_serving(comparable(measured.serving), folder / SERVING_PLOT)
