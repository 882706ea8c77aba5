"""The model card: `model_card.md` filled with what the model's folder knows. What is not known is left out."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from fastbert_hf.checkpoint_fastbert import read_json
from fastbert_hf.configuration_fastbert import FastBertConfig
from fastbert_hf.data.glue import CUSTOM, HUB_DATASET
from fastbert_hf.hub.embedder import is_embedder
from fastbert_hf.hub.origin import repository_address

TEMPLATE = Path(__file__).with_name("model_card.md")
WHOLE_MODEL = "whole encoder, inference"  # section of the benchmark
SUMMARY, RECIPE, CARD = "summary.json", "recipe.json", "README.md"
DISTILLATION_PAGE = "distillation.md"  # to which the card of a distilled model leads
DISTILLED_FROM = "distilled_from"  # key of a summary
PIPELINES = {
    "FastBertModel": ("feature-extraction", "AutoModel"),
    "FastBertForMaskedLM": ("fill-mask", "AutoModelForMaskedLM"),
    "FastBertForSequenceClassification": ("text-classification", "AutoModelForSequenceClassification"),
    "FastBertForTokenClassification": ("token-classification", "AutoModelForTokenClassification"),
    "FastBertForQuestionAnswering": ("question-answering", "AutoModelForQuestionAnswering"),
    "FastBertForMultipleChoice": ("multiple-choice", "AutoModelForMultipleChoice"),
}
METRICS = {
    "accuracy": "accuracy",
    "f1": "f1",
    "matthews_correlation": "matthews correlation",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
}
METRIC_IDS = {"pearson": "pearsonr", "spearman": "spearmanr"}  # as https://hf.co/metrics calls them
LICENCE_METADATA = ("license", "license_name", "license_link")
KEPT_METADATA = (*LICENCE_METADATA, "language", "base_model", "datasets")


def kept_metadata(folder: Path) -> dict[str, Any]:
    """Licence, language, base model and data sets that the folder's own README.md declares."""
    file = folder / CARD
    if not file.is_file():
        return {}
    _, marker, rest = file.read_text(encoding="utf-8").partition("---\n")
    try:
        header = yaml.safe_load(rest.partition("\n---")[0]) if marker else None
    except yaml.YAMLError:
        return {}
    return {name: header[name] for name in KEPT_METADATA if header.get(name)} if isinstance(header, dict) else {}


def hub_name(model: str) -> str | None:
    """The name of a model on the Hub; None for a local path."""
    try:
        validate_repo_id(model)
    except HFValidationError:
        return None
    return None if Path(model).is_dir() else model


def public_name(model: str) -> str:
    """The name of a model on the Hub, or the folder's name alone of a local path, which concerns nobody else."""
    return hub_name(model) or PureWindowsPath(model).name  # it takes "/" and the backslash for separators


def evaluation_results(summary: Mapping[str, Any]) -> list[EvalResult]:
    """What a training summary measured, in the form of the Hub's model-index."""
    results = []
    task = summary.get("task")
    for key in summary:
        metric, split = _metric(key)
        if task is None or metric is None:
            continue
        custom = task in (CUSTOM, "own")  # its earlier name
        results.append(
            EvalResult(
                task_type="text-classification",
                dataset_type=CUSTOM if custom else HUB_DATASET,
                dataset_name="custom data" if custom else f"GLUE {task}",
                dataset_config=None if custom else task,
                dataset_split=split,
                metric_type=METRIC_IDS.get(metric, metric),
                metric_name=METRICS[metric],
                metric_value=round(summary[key], 4),
            )
        )
    if "validation_loss" in summary:
        results.append(
            EvalResult(
                task_type="fill-mask",
                dataset_type="held-out",
                dataset_name="held-out part of the training text",
                metric_type="loss",
                metric_name="cross-entropy of masked tokens, in nats",
                metric_value=round(summary["validation_loss"], 4),
            )
        )
    return results


def _metric(key: str) -> tuple[str | None, str]:
    """(metric, split) of a summary's key: "f1" or, with several splits, "accuracy_validation_matched"."""
    for metric in METRICS:
        if key == metric or key.startswith(f"{metric}_"):
            return metric, key[len(metric) + 1 :] or "validation"
    return None, ""


def results_table(summary: Mapping[str, Any]) -> str:
    """Results beside the baselines they must be read with; empty if nothing was measured."""
    rows = []
    for key in summary:
        metric, split = _metric(key)
        if metric is not None and "task" in summary:
            baseline = summary.get(f"majority_{key}")
            score = "" if baseline is None else f"{baseline:.4f} (constant answer)"
            rows.append(f"| {summary['task']}, {split} | {METRICS[metric]} | {summary[key]:.4f} | {score} |")
    if "validation_loss" in summary:
        baseline = summary.get("unigram_loss")
        score = "" if baseline is None else f"{baseline:.4f} (token frequencies)"
        rows.append(f"| masked tokens of held-out text | nats | {summary['validation_loss']:.4f} | {score} |")
        if "validation_accuracy" in summary:
            rows.append(f"| masked tokens of held-out text | accuracy | {summary['validation_accuracy']:.4f} | |")
    return "\n".join(["| on | measure | this model | baseline |", "|---|---|---|---|", *rows]) if rows else ""


def training_text(summary: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    """What is recorded of the training run, one row a value."""
    counts = ("steps", "tokens_seen", "train_tokens", "train_examples", "train_seconds", "tokens_per_second")
    rows = {**{name: summary.get(name) for name in counts}, **recipe}
    if "seed" not in rows:
        rows["seed"] = summary.get("seed")
    known = {name: value for name, value in rows.items() if value not in (None, "", [], {})}
    lines = [f"| {name} | {f'{value:,}' if type(value) is int else value} |" for name, value in known.items()]
    return "\n".join(["| | |", "|---|---|", *lines]) if lines else ""


def sources_text(summary: Mapping[str, Any]) -> str:
    """Where the training text came from and under which licence, one row a source; empty if that is not recorded."""
    rows = []
    for source in summary.get("sources") or ():
        digest = source.get("sha256")
        version = f"SHA-256 {digest[:16]}" if digest else source.get("revision") or ""
        rows.append(f"| {source['name']} | {version} | {source.get('license') or 'not stated'} |")
    return "\n".join(["| source | version | licence |", "|---|---|---|", *rows]) if rows else ""


def limits_text(summary: Mapping[str, Any], parameters: int) -> str:
    """What a pretraining run says nothing about; empty for other models."""
    if "validation_loss" not in summary or not summary.get("tokens_seen"):
        return ""
    tokens = summary["tokens_seen"]
    return (
        f"Seen in training: {tokens:,} tokens, {tokens / parameters:.1f} for each of {parameters:,} parameters; BERT "
        "saw about 137 billion. Held-out loss on text like the training text is all that was measured: no downstream "
        "task, no other language or domain, no social bias, no facts that the model may state wrongly."
    )


def speed_table(file: Path, config: FastBertConfig) -> str:
    """Figures of `scripts/benchmark.py`: rows whose result was checked, on a machine that was not busy.

    Args:
        file: its results.json.
        config: the model's configuration; whole models are measured in the published geometry only.

    Raises:
        ValueError: no such file, or figures of another geometry or none of whole models.
    """
    if not file.is_file():
        raise ValueError(f"no benchmark results in {str(file)!r}; expected a results.json of scripts/benchmark.py")
    for name in ("ffn_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "fff_depth", "fff_trees"):
        value, measured = getattr(config, name), getattr(FastBertConfig(), name)
        if value != measured:
            raise ValueError(f"{str(file)!r} measures models with {name} {measured}; this model has {value}")
    content = read_json(file)
    rows = [
        f"| {row['case']} tokens | {row['threads']} | {row['dtype']} | {row['median_ms']:.4g} | "
        f"{row['speedup']:.3g} times the speed of {row['baseline']} |"
        for row in content.get("rows", ())
        if (row["section"], row["entry"]) == (WHOLE_MODEL, "FastBERT")
        and not (row["busy"] or "MISMATCH" in row["match"])
    ]
    if not rows:
        raise ValueError(f"{str(file)!r} has no figure of a whole model that could be quoted; run it again, alone")
    machine = {name: content.get("machine", {}).get(name) for name in ("processor", "torch", "commit")}
    described = ", ".join(f"{name} {value}" for name, value in machine.items() if value)
    head = ["| case | threads | dtype | ms a call | |", "|---|---|---|---|---|"]
    return "\n".join([f"Measured with `scripts/benchmark.py` on {described}.", "", *head, *rows])


@contextmanager
def _about(file: Path) -> Iterator[None]:
    """Raise what a value of the wrong kind in a file causes as a ValueError that names the file."""
    try:
        yield
    except (AttributeError, KeyError, RecursionError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{str(file)!r} holds something else than expected: {type(error).__name__}: {error}"
        ) from error


def _metadata(folder: Path, declared: Mapping[str, Any]) -> dict[str, Any]:
    """What README.md declares, with what is declared in its place."""
    with _about(folder / CARD):
        metadata = kept_metadata(folder)
    replaced = LICENCE_METADATA if "license" in declared else ()
    return {name: value for name, value in metadata.items() if name not in replaced} | dict(declared)


def _sections(folder: Path, summary: Mapping[str, Any], parameters: int) -> dict[str, str]:
    """What the card says of the training run in its folder, by the names of the template."""
    return {
        "results": results_table(summary),
        "sources": sources_text(summary),
        "limits": limits_text(summary, parameters),
        "training": training_text(summary, read_json(folder / RECIPE)),
        "distilled_from": public_name(summary.get(DISTILLED_FROM, "")),
        "distillation_page": DISTILLATION_PAGE if (folder / DISTILLATION_PAGE).is_file() else "",
    }


def render_card(
    folder: Path,
    config: FastBertConfig,
    architecture: str,
    parameters: int,
    repo: str,
    declared: Mapping[str, Any] | None = None,
    speed: Path | None = None,
) -> str:
    """Render the card of a model.

    Args:
        folder: read for summary.json and recipe.json of a training run, and README.md for licence and origin.
        config: the model's configuration.
        architecture: name of its class.
        parameters: number of values, tied ones once.
        repo: NAMESPACE/NAME it will be found under.
        declared: metadata in place of what README.md declares, such as {"license": "mit"}. A licence takes the place
            of its name and link, too.
        speed: results.json of `scripts/benchmark.py`.

    Returns:
        README.md, header included.

    Raises:
        ValueError: a file that is not what it should be.
    """
    summary = read_json(folder / SUMMARY)
    metadata = _metadata(folder, declared or {})
    with _about(folder / SUMMARY):
        evaluations = evaluation_results(summary)
        sections = _sections(folder, summary, parameters)
    with _about(speed or folder):
        sections["speed"] = speed_table(speed, config) if speed else ""
    pipeline, auto_class = PIPELINES[architecture]
    embedder = is_embedder(folder)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="sentence-similarity" if embedder else pipeline,
        tags=["fastbert", "fast-feedforward", *(["sentence-transformers"] if embedder else [])],
        model_name=repo.rpartition("/")[2],
        eval_results=evaluations or None,
        **metadata,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        model_id=repo,
        auto_class=auto_class,
        repository=repository_address(),
        parameters=f"{parameters:,}",
        labels=", ".join(config.id2label.values()) if pipeline.endswith("classification") else "",
        is_embedder=embedder,
        has_tokenizer=(folder / "tokenizer_config.json").is_file(),
        **sections,
        neurons_per_token=config.neurons_per_token,
        neurons_per_layer=config.neurons_per_layer,
        **config.to_dict(),
    )
    return str(card).rstrip() + "\n"
