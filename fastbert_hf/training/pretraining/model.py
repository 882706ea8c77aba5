"""The model that pretraining starts from: a recipe that fits the tokenizer, or weights to go on from."""

import dataclasses
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fastbert_hf.recipes import load_yaml
from fastbert_hf.training.checkpoints import check_weights
from fastbert_hf.training.runs import check_fit


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
        sparse_prediction: fraction of labelled positions, 0 to compute the decoder everywhere, None to leave it to
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


def build_model(
    recipe: str | None,
    path: str | None,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    sparse: float,
    disable_dropout: bool,
) -> PreTrainedModel:
    """Build a new model, or load weights to go on from.

    Args:
        recipe: YAML with configuration fields, for a new model.
        path: model folder or Hub name, where there is no recipe.
        tokenizer: what makes its input.
        max_seq_length: longest sequence the run feeds.
        sparse: fraction of labelled positions, 0 to compute the decoder everywhere.
        disable_dropout: build it without dropout; its configuration keeps the values.

    Returns:
        The model.

    Raises:
        ValueError: it cannot be built or loaded, or does not fit the tokenizer.
    """
    try:
        if path is None:
            config = model_config(load_yaml(recipe), tokenizer, max_seq_length, sparse)
        else:
            check_weights(path)
            config = AutoConfig.from_pretrained(path)
            check_fit(config, tokenizer, max_seq_length)
            if hasattr(config, "sparse_prediction"):
                config.sparse_prediction = sparse
        dropouts = _dropouts(config) if disable_dropout else {}
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
