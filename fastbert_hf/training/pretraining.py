"""Masked-language-model pretraining: text and a model recipe in, a model folder and a summary out."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from fastbert_hf.data.corpus import check_corpus_files, read_documents, split_documents
from fastbert_hf.data.masking import MaskedLanguageModelCollator, MaskedSequences, check_probability
from fastbert_hf.data.packing import PackedSequences, pack_documents
from fastbert_hf.data.tokenizer import load_tokenizer
from fastbert_hf.training.arguments import load_yaml
from fastbert_hf.training.metrics import unigram_loss
from fastbert_hf.training.publishing import check_push, prepare_folder, publish, write_recipe
from fastbert_hf.training.runs import (
    check_checkpoint,
    check_fit,
    check_options,
    check_weights,
    find_checkpoint,
    is_main_process,
    quiet_host,
    remove_checkpoints,
    save_model,
    train,
    write_summary,
)


@dataclass
class PretrainingArguments:
    """What is trained, and on which text."""

    model_config: str | None = field(
        default=None, metadata={"help": "YAML with model configuration fields, e.g. configs/model/small-1x9.yaml"}
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "continue from these weights instead of a new model from model_config"}
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "tokenizer folder or Hub name"})
    train_file: list[str] = field(
        default_factory=list, metadata={"help": "text files (.txt, .xz), one document a line"}
    )
    validation_file: list[str] = field(
        default_factory=list, metadata={"help": "held-out text files; without them part of train_file is held out"}
    )
    validation_share: float = field(
        default=0.02, metadata={"help": "part of the documents held out where no validation_file is given"}
    )
    max_eval_samples: int = field(default=512, metadata={"help": "held-out sequences used at most"})
    max_seq_length: int = field(default=128, metadata={"help": "tokens per packed sequence"})
    mlm_probability: float = field(default=0.25, metadata={"help": "share of positions to predict"})
    sparse_prediction: bool = field(
        default=True, metadata={"help": "compute the decoder at predicted positions only while training"}
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "train without dropout; the saved configuration keeps its values"}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "remove the checkpoints in output_dir instead of resuming from them"}
    )


@dataclass
class PretrainingData:
    """Everything a run feeds to the model.

    Attributes:
        train: packed training sequences, a whole number of batches.
        validation: held-out sequences, masked once.
        collator: masks training batches.
        unigram_loss: the baseline beside the held-out loss, in nats.
    """

    train: PackedSequences
    validation: MaskedSequences
    collator: MaskedLanguageModelCollator
    unigram_loss: float


def model_config(
    recipe: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    sparse_prediction: float | None = None,
) -> PreTrainedConfig:
    """Build a model configuration that fits a tokenizer.

    Args:
        recipe: configuration fields; `model_type` defaults to "fastbert", `vocab_size` to the tokenizer's.
        tokenizer: fixes the vocabulary and the padding id.
        max_seq_length: longest sequence the run feeds.
        sparse_prediction: share of labelled positions, 0 to compute the decoder everywhere, None to leave it to
            the recipe. Ignored by models without that option.

    Returns:
        The configuration.

    Raises:
        ValueError: for an unknown model type or field, a wrong value, a vocabulary smaller than the tokenizer's,
            or fewer positions than `max_seq_length`.
    """
    fields = dict(recipe)
    model_type = fields.pop("model_type", "fastbert")
    fields.setdefault("vocab_size", len(tokenizer))
    if fields.setdefault("pad_token_id", tokenizer.pad_token_id) != tokenizer.pad_token_id:
        raise ValueError(
            f"pad_token_id {fields['pad_token_id']!r} in the model recipe is not the tokenizer's "
            f"{tokenizer.pad_token_id}; leave it out"
        )
    try:
        known = {entry.name for entry in dataclasses.fields(AutoConfig.for_model(model_type))}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"unknown model_type {model_type!r} in the model recipe") from error
    unknown = sorted(set(fields) - known, key=str)
    if unknown:
        raise ValueError(f"the model recipe has an unknown field {unknown[0]!r} for model_type {model_type!r}")
    _check_label_names(fields.get("id2label"))
    if sparse_prediction is not None and "sparse_prediction" in known:
        fields["sparse_prediction"] = sparse_prediction
    try:
        config = AutoConfig.for_model(model_type, **fields)
    except (StrictDataclassError, TypeError, AttributeError) as error:
        raise ValueError(f"the model recipe does not fit model_type {model_type!r}: {error}") from error
    check_fit(config, tokenizer, max_seq_length)
    return config


def _check_label_names(names: Any) -> None:
    """Check the `id2label` of a recipe, if it has one."""
    if names is None:
        return
    if not isinstance(names, dict) or set(map(str, names)) != set(map(str, range(len(names)))):
        raise ValueError(f"id2label in the model recipe must map the ids 0, 1, ... to label names; got {names!r}")


def prepare_data(
    options: PretrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    vocab_size: int,
    seed: int,
    progress: bool = True,
) -> PretrainingData:
    """Read, tokenize, pack and mask.

    Args:
        options: files and shapes.
        tokenizer: how to tokenize.
        batch_size: sequences per optimiser step, over all devices and accumulation steps.
        vocab_size: V of the model, for the unigram baseline.
        seed: for the masks.
        progress: show progress bars.

    Returns:
        The data.

    Raises:
        ValueError: if the corpus is empty, is smaller than one batch, or leaves no held-out sequence.
    """
    collator = MaskedLanguageModelCollator(tokenizer, options.mlm_probability, seed)
    documents = read_documents(options.train_file)
    if options.validation_file:
        train_documents, held_out = documents, read_documents(options.validation_file)
    else:
        train_documents, held_out = split_documents(documents, options.validation_share)
    validation = pack_documents(held_out, tokenizer, options.max_seq_length, name="held-out text")
    if not len(validation):
        raise ValueError(
            f"the held-out text is shorter than one sequence of {options.max_seq_length} tokens; "
            "give a longer validation_file or a larger validation_share"
        )
    train = pack_documents(train_documents, tokenizer, options.max_seq_length, progress)
    # Whole batches only: every step has the same shapes and the same number of masked positions.
    usable = len(train) // batch_size * batch_size
    if not usable:
        raise ValueError(
            f"the corpus is smaller than one batch: it gives {len(train)} sequences of {options.max_seq_length} "
            f"tokens, and one step takes {batch_size}"
        )
    # Fixed seed: runs with other seeds are compared on the same held-out positions.
    fixed = MaskedLanguageModelCollator(tokenizer, options.mlm_probability, seed=0)
    held = MaskedSequences(PackedSequences(validation.input_ids[: options.max_eval_samples]), fixed)
    baseline = unigram_loss(train.input_ids[:, 1:], held.labels, vocab_size)  # without [CLS], never predicted
    return PretrainingData(PackedSequences(train.input_ids[:usable]), held, collator, baseline)


def _check(options: PretrainingArguments) -> None:
    if (options.model_config is None) == (options.model_name_or_path is None):
        raise ValueError("exactly one of --model_config and --model_name_or_path is wanted")
    if options.tokenizer_name is None and options.model_name_or_path is None:
        raise ValueError("--tokenizer_name is missing; scripts/train_tokenizer.py makes a tokenizer")
    check_probability(options.mlm_probability)
    if options.max_eval_samples < 1:
        raise ValueError(f"max_eval_samples must be at least 1; got {options.max_eval_samples}")
    check_corpus_files(options.train_file)
    if options.validation_file:
        check_corpus_files(options.validation_file)


def _build_model(options: PretrainingArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    sparse = options.mlm_probability if options.sparse_prediction else 0.0
    path = options.model_name_or_path
    try:
        if path is None:
            config = model_config(load_yaml(options.model_config), tokenizer, options.max_seq_length, sparse)
        else:
            check_weights(path)
            config = AutoConfig.from_pretrained(path)
            check_fit(config, tokenizer, options.max_seq_length)
            if hasattr(config, "sparse_prediction"):
                config.sparse_prediction = sparse
        dropouts = _dropouts(config) if options.disable_dropout else {}
        for name in dropouts:
            setattr(config, name, 0.0)
        if path is None:
            model = AutoModelForMaskedLM.from_config(config)
        else:
            model = AutoModelForMaskedLM.from_pretrained(path, config=config)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"no model can be loaded from {path!r}: {reason}") from error
    # Modules took their zeros when they were built; fine-tuning starts from the recipe's values.
    for name, value in dropouts.items():
        setattr(model.config, name, value)
    return model


def _dropouts(config: PreTrainedConfig) -> dict[str, float]:
    """The configuration's dropout probabilities above zero."""
    values = {name: value for name, value in config.to_dict().items() if "dropout" in name}
    return {name: value for name, value in values.items() if isinstance(value, int | float) and value > 0}


def pretrain(options: PretrainingArguments, args: TrainingArguments) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Pretrain a model with the masked-language-model objective.

    Picks up the last complete checkpoint in `args.output_dir`. The finished folder loads with
    `AutoModelForMaskedLM` and holds the tokenizer and `summary.json`.

    Args:
        options: model, text and masking.
        args: optimisation, as for every Trainer.

    Returns:
        The trained model, and the summary: held-out loss, unigram baseline, counts, times.

    Raises:
        ValueError: for anything wrong in the options, before training starts.
    """
    check_options(args, options.max_seq_length)
    _check(options)
    check_push(args)
    checkpoint = find_checkpoint(args, options.overwrite_output_dir)
    tokenizer = load_tokenizer(options.tokenizer_name or options.model_name_or_path, needs_mask=True)
    quiet_host(args)
    set_seed(args.seed)
    model = _build_model(options, tokenizer)
    check_checkpoint(checkpoint, model.config)
    step_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    data = prepare_data(
        options, tokenizer, step_size, model.config.vocab_size, args.seed, progress=not args.disable_tqdm
    )
    args.prediction_loss_only = True  # (S, T, V) logits of all held-out sequences would not fit
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.validation,
        data_collator=data.collator,
        processing_class=tokenizer,
    )
    if options.overwrite_output_dir and is_main_process(args):
        remove_checkpoints(args.output_dir)
    prepare_folder(trainer)
    result = train(trainer, checkpoint)
    loss = trainer.evaluate()["eval_loss"]
    if not math.isfinite(loss):
        raise ValueError(f"training diverged: the held-out loss is {loss}; try a lower learning rate")
    save_model(trainer, tokenizer)
    summary = {
        "validation_loss": loss,
        "unigram_loss": data.unigram_loss,
        "nats_under_unigram": data.unigram_loss - loss,
        **result,
        "tokens_seen": result["steps"] * step_size * options.max_seq_length,
        "train_tokens": int(data.train.input_ids.size),
        "validation_sequences": len(data.validation),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seed": args.seed,
    }
    _finish(trainer, options, summary)
    return model, summary


def _finish(trainer: Trainer, options: PretrainingArguments, summary: dict[str, Any]) -> None:
    """Write recipe and summary into the output folder and, where that is asked for, push it."""
    if is_main_process(trainer.args):
        recorded = ("max_seq_length", "mlm_probability", "disable_dropout")
        write_recipe(trainer.args, **{name: getattr(options, name) for name in recorded})
        write_summary(trainer.args.output_dir, summary)
    publish(trainer)
