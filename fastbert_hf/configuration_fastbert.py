# Copyright 2026 The FastBERT authors. Licensed under the MIT License.
"""Configuration of FastBERT: BERT with fast feedforward trees."""

from collections.abc import Callable, Iterable
from dataclasses import fields
from difflib import get_close_matches
from functools import wraps
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.utils import logging

from .fff_reference import MAX_DEPTH, nodes_per_tree
from .leaf_reference import MAX_LEAF_DEPTH, leaves_per_tree

logger = logging.get_logger(__name__)

# how alike an unknown key and a field are when the key is taken for a misspelling: `ffn_depth` is 0.89,
# `sep_token_id` beside `pad_token_id` 0.83
MISSPELT = 0.85

# A repository of any FastBERT head opens as every one of these classes.
AUTO_MAP = {
    "AutoConfig": "configuration_fastbert.FastBertConfig",
    "AutoModel": "modeling_fastbert.FastBertModel",
    "AutoModelForMaskedLM": "modeling_fastbert.FastBertForMaskedLM",
    "AutoModelForSequenceClassification": "modeling_fastbert.FastBertForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_fastbert.FastBertForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_fastbert.FastBertForQuestionAnswering",
    "AutoModelForMultipleChoice": "modeling_fastbert.FastBertForMultipleChoice",
}


def _raise_value_errors(cls: type) -> type:
    """Make construction, assignment and validation raise ValueError, not the errors of strict dataclasses.

    Numbers of NumPy, as hyperparameter searches give them, are assigned as Python's: only those can be saved as JSON.
    """

    def translated(method):
        @wraps(method)
        def wrapper(self, *args, **kwargs):
            try:
                return method(self, *args, **kwargs)
            except StrictDataclassError as error:
                raise ValueError(str(error)) from error

        return wrapper

    strict_setattr = translated(cls.__setattr__)

    def setattr_plain(self, name, value):
        if getattr(value, "shape", None) == () and hasattr(value, "item"):
            value = value.item()
        strict_setattr(self, name, value)

    cls.__init__ = translated(cls.__init__)
    cls.__setattr__ = setattr_plain
    cls.validate = translated(cls.validate)
    return cls


@_raise_value_errors
@strict
class FastBertConfig(PreTrainedConfig):
    """Configuration of a FastBERT model. The defaults are the geometry of the published model, UltraFastBERT-1x11.

    `norm_scheme="post"` with `use_bias=True`, `type_vocab_size=2`, `position_embedding_type="absolute"` and
    `final_norm=False` is the geometry of BERT, with or without trees in its feed-forward blocks.

    Args:
        vocab_size: entries V of the word embedding.
        hidden_size: width H of the residual stream; a multiple of num_attention_heads.
        num_hidden_layers, num_attention_heads: L and the heads of each layer.
        max_position_embeddings: rows of the position table; the longest sequence, in tokens, where all are counted.
        position_numbering: the positions of tokens without position_ids. "all": 0..T-1. "non_padding", as in RoBERTa:
            tokens other than pad_token_id are counted from pad_token_id + 1, and padding has position pad_token_id.
            Sequences, padding included, then have at most max_position_embeddings - pad_token_id - 1 tokens.
        ffn_type: "fff" (trees) or "dense" (a plain feed-forward block, the baseline).
        fff_depth: depth D of a tree; it has 2^(D+1) - 1 neurons and a token uses D + 1 of them.
        fff_leaf_width: None for trees of single neurons, the published form, where every node that a token visits
            adds to the output. An integer w makes leaf trees: 2^D leaves of w neurons behind D decisions, and a token
            uses one leaf of each tree.
        fff_trees: number P of trees in a layer; every token walks all of them.
        fff_bias: whether the trees' neurons have a bias, and the leaves of leaf trees an output bias.
        intermediate_size: width of the dense block. dense_gated: whether it is a gated unit (GLU).
        hidden_act: "gelu" (exact), "gelu_tanh", "relu" or "silu", in trees, dense blocks and the MLM transform.
        norm_scheme: "pre" (norm before attention and feed-forward) or "post" (after the addition, as in BERT).
        embedding_norm, final_norm: LayerNorm after the embedding; after the last layer.
        layer_norm_eps: epsilon of every LayerNorm.
        position_embedding_type: "scaled_sinusoidal" (fixed, one learned scale) or "absolute" (learned).
        type_vocab_size: token types; 0 means none, and token_type_ids are then accepted and ignored.
        use_bias: biases in attention projections, dense blocks and the MLM transform.
        mlm_head_transform: dense layer, activation and norm before the decoder. decoder_bias: its bias.
        mlm_head_act: activation of the transform; None means hidden_act.
        sparse_prediction: 0 decodes every position. Above 0, training decodes labelled positions only: the loss is
            the same, the logits are (labelled positions, V). Compiled models then decode round(share * B * T)
            positions of every batch and refuse more labels, so the value must be the largest share of labels in any
            batch. The recipes in configs/pretrain set it; their collator masks the same number in every batch.
            Transformers' collator masks a random number: leave it 0, or well above mlm_probability.
        classifier_pooling: "cls", "mean" (padding excluded), "mean_all" (padding included), "max" or "lse"
            (maximum and logsumexp over all positions).
        classifier_activation: "tanh" or, as in DistilBERT, "relu", between pooling and classifier.
        classifier_head_dim: width of the dense layer between pooling and classifier; None leaves it out.
        hidden_dropout_prob, attention_probs_dropout_prob, classifier_dropout: dropout probabilities.
        embedding_dropout_prob: dropout after the embedding; None means hidden_dropout_prob.
        initializer_range: standard deviation of initial weights.
        pad_token_id: its word embedding receives no gradient from the input side.
    Raises:
        ValueError: a value of the wrong type or outside its range, the message names both; an unknown key that is
            almost the name of a field. In a stored configuration, which a later version may have written, such a
            key is a warning. Other unknown keys become attributes, as everywhere in Transformers.
    Source: arXiv 2311.10770; the geometry is that of "crammed" BERT, arXiv 2212.14034.
    """

    model_type = "fastbert"
    # config layouts of other libraries, by their model_type: functions from their dict to ours
    foreign_layouts: ClassVar[dict[str, Callable[[dict], dict]]] = {}

    vocab_size: int = 32768
    hidden_size: int = 768
    num_hidden_layers: int = 16
    num_attention_heads: int = 12
    max_position_embeddings: int = 128
    position_numbering: Literal["all", "non_padding"] = "all"
    ffn_type: Literal["fff", "dense"] = "fff"
    fff_depth: int = 11
    fff_leaf_width: int | None = None
    fff_trees: int = 1
    fff_bias: bool = True
    intermediate_size: int = 3072
    dense_gated: bool = False
    hidden_act: Literal["gelu", "gelu_tanh", "relu", "silu"] = "gelu"
    norm_scheme: Literal["pre", "post"] = "pre"
    embedding_norm: bool = True
    final_norm: bool = True
    layer_norm_eps: float | int = 1e-12
    position_embedding_type: Literal["scaled_sinusoidal", "absolute"] = "scaled_sinusoidal"
    type_vocab_size: int = 0
    use_bias: bool = False
    mlm_head_transform: bool = False
    mlm_head_act: Literal["gelu", "gelu_tanh", "relu", "silu"] | None = None
    decoder_bias: bool = False
    sparse_prediction: float | int = 0.0
    classifier_pooling: Literal["cls", "mean", "mean_all", "max", "lse"] = "cls"
    classifier_head_dim: int | None = 1024
    classifier_activation: Literal["tanh", "relu"] = "tanh"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    embedding_dropout_prob: float | int | None = None
    classifier_dropout: float | int = 0.1
    initializer_range: float | int = 0.02
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        stored = "model_type" in kwargs or self.transformers_version is not None  # nobody types these
        self._check_spelling(kwargs, stored)
        # code travels with the weights: a model saved again must not point at the repository it was loaded from
        given = {
            auto: target.rpartition("--")[2] if isinstance(target, str) else target  # a pair for tokenizers
            for auto, target in (kwargs.get("auto_map") or {}).items()
        }
        kwargs["auto_map"] = AUTO_MAP | given
        super().__post_init__(**kwargs)

    @classmethod
    def _check_spelling(cls, keys: Iterable[str], stored: bool) -> None:
        """Refuse, or warn of where they are stored, unknown keys that are almost the name of a field."""
        names = [field.name for field in fields(cls)]
        for key in keys:
            known = key in names or hasattr(cls, key) or key.startswith("_")
            if not known and (close := get_close_matches(key, names, n=1, cutoff=MISSPELT)):
                message = f"{cls.__name__} has no field {key!r}; did you mean {close[0]!r}?"
                if not stored:
                    raise ValueError(message)
                logger.warning(f"{message} The configuration that is loaded holds it; it has no effect.")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As in PreTrainedConfig; layouts named in `foreign_layouts` are translated first.

        Raises:
            ValueError: the dictionary is of another model type; see the class for the rest.
        """
        cls._check_spelling(kwargs, stored=False)
        return super().from_dict(cls._translated(config_dict), **kwargs)

    @classmethod
    def get_config_dict(cls, *args, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in PreTrainedConfig, in our own layout: it warns of files of another model type.

        Raises:
            ValueError: the file is of another model type.
        """
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)
        return cls._translated(config_dict), kwargs

    @classmethod
    def _translated(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        """The dictionary in our own layout."""
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type in cls.foreign_layouts:
            return {"model_type": cls.model_type, **cls.foreign_layouts[model_type](config_dict)}
        if model_type != cls.model_type:
            expected = " or ".join(map(repr, (cls.model_type, *cls.foreign_layouts)))
            raise ValueError(f"the configuration is of model_type {model_type!r}; expected {expected}")
        return config_dict

    @property
    def first_position(self) -> int:
        """Position of a sequence's first token that is not padding."""
        return 0 if self.position_numbering == "all" else self.pad_token_id + 1

    @property
    def longest_sequence(self) -> int:
        """Tokens T that a sequence may have, padding included."""
        return self.max_position_embeddings - self.first_position

    @property
    def neurons_per_token(self) -> int:
        """Feed-forward neurons that one token uses in one layer."""
        if self.ffn_type != "fff":
            return self.intermediate_size
        return self.fff_trees * (self.fff_leaf_width or self.fff_depth + 1)

    @property
    def neurons_per_layer(self) -> int:
        """Feed-forward neurons that one layer holds."""
        if self.ffn_type != "fff":
            return self.intermediate_size
        if self.fff_leaf_width is not None:
            return self.fff_trees * leaves_per_tree(self.fff_depth) * self.fff_leaf_width
        return self.fff_trees * nodes_per_tree(self.fff_depth)

    def validate_ranges(self):
        """Numbers outside their range."""
        ranges = {
            "vocab_size": (1, None),
            "hidden_size": (1, None),
            "num_hidden_layers": (0, None),
            "num_attention_heads": (1, None),
            "max_position_embeddings": (1, None),
            "fff_depth": (0, MAX_DEPTH),
            "fff_leaf_width": (1, None),
            "fff_trees": (1, None),
            "intermediate_size": (1, None),
            "type_vocab_size": (0, None),
            "classifier_head_dim": (1, None),
            "sparse_prediction": (0, 1),
            "hidden_dropout_prob": (0, 1),
            "attention_probs_dropout_prob": (0, 1),
            "embedding_dropout_prob": (0, 1),
            "classifier_dropout": (0, 1),
            "layer_norm_eps": (0, None),
            "initializer_range": (0, None),
        }
        for name, (least, most) in ranges.items():
            value = getattr(self, name)
            if value is not None and not (value >= least and (most is None or value <= most)):
                allowed = f"at least {least}" if most is None else f"between {least} and {most}"
                raise ValueError(f"{name} is {value}; expected {allowed}")

    def validate_combinations(self):
        """Values that do not go together."""
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size is {self.hidden_size}; expected a multiple of num_attention_heads, "
                f"{self.num_attention_heads}"
            )
        if self.position_embedding_type == "scaled_sinusoidal" and self.hidden_size % 2:
            raise ValueError(f"hidden_size is {self.hidden_size}; scaled_sinusoidal positions need an even one")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"pad_token_id is {self.pad_token_id}; expected None or a value between 0 and vocab_size - 1, "
                f"{self.vocab_size - 1}"
            )
        if self.position_numbering == "non_padding":
            if self.pad_token_id is None:
                raise ValueError("pad_token_id is None; position_numbering 'non_padding' counts from it")
            if self.longest_sequence < 1:
                raise ValueError(
                    f"max_position_embeddings is {self.max_position_embeddings}; position_numbering 'non_padding' "
                    f"needs more than pad_token_id + 1, {self.first_position}"
                )
        if self.fff_leaf_width is not None and self.ffn_type != "fff":
            raise ValueError(
                f"fff_leaf_width is {self.fff_leaf_width} with ffn_type {self.ffn_type!r}; "
                "only 'fff' layers have leaves"
            )
        if self.fff_leaf_width is not None and self.fff_depth > MAX_LEAF_DEPTH:
            raise ValueError(f"fff_depth is {self.fff_depth}; expected at most {MAX_LEAF_DEPTH} for leaf trees")
        if self.dense_gated and self.ffn_type != "dense":
            raise ValueError(f"dense_gated is True with ffn_type {self.ffn_type!r}; only 'dense' blocks are gated")


__all__ = ["FastBertConfig"]
