"""The BERT family: checkpoints of BERT, RoBERTa, XLM-RoBERTa, CamemBERT and DistilBERT load as FastBERT.

Importing this module teaches `FastBertConfig` their configurations and Transformers' loader their tensors, so that
`FastBertModel.from_pretrained("folder of a BERT")` gives the same model with dense feed-forward layers. The Auto
classes keep Transformers' own models for these types. Saving always writes the native layout.
Source: the models of Transformers, models/{bert,roberta,xlm_roberta,camembert,distilbert}.
"""

from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

from fastbert_hf.configuration_fastbert import FastBertConfig
from fastbert_hf.published_layout import LoadOnly

# activations by the names that Transformers has for them
ACTIVATION_NAMES = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
# fields of FastBertConfig that every member of the family has
GEOMETRY = {
    "ffn_type": "dense",
    "norm_scheme": "post",
    "embedding_norm": True,
    "final_norm": False,
    "position_embedding_type": "absolute",
    "use_bias": True,
    "mlm_head_transform": True,
    "decoder_bias": True,
    "classifier_pooling": "cls",
}
# settings that change what is computed, and the only value of each that FastBERT has
ONLY_VALUES = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "pruned_heads": {},
    "quantization_config": None,
    "auto_map": None,  # code of its own
}
# keys that say nothing about the model
IRRELEVANT = {"model_type", "transformers_version", "gradient_checkpointing", "use_cache", "embedding_size"}
HEADS = {
    "ForPreTraining": "FastBertForMaskedLM",
    "ForMaskedLM": "FastBertForMaskedLM",
    "ForSequenceClassification": "FastBertForSequenceClassification",
    "ForTokenClassification": "FastBertForTokenClassification",
    "ForQuestionAnswering": "FastBertForQuestionAnswering",
    "ForMultipleChoice": "FastBertForMultipleChoice",
    "LMHeadModel": "FastBertForMaskedLM",  # one that is no decoder
    "Model": "FastBertModel",  # the last: other names end with it
}
SAME_NAMES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "initializer_range",
    "pad_token_id",
    "tie_word_embeddings",
)
BERT_NAMES = (
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "classifier_dropout",
    "layer_norm_eps",
    "type_vocab_size",
)


@dataclass(frozen=True)
class Family:
    """What tells the configurations of one architecture from those of the others.

    Attributes:
        names: fields of FastBertConfig, and what this architecture calls them, beside `SAME_NAMES`.
        fixed: fields of FastBertConfig that are the same in all its models, beside `GEOMETRY`.
        head_dropout: heads whose dropout is not the one in `names`, and the setting that it is.
    """

    names: dict[str, str]
    fixed: dict[str, Any] = field(default_factory=dict)
    head_dropout: dict[str, str] = field(default_factory=dict)


BERT = Family({name: name for name in BERT_NAMES})
ROBERTA = Family(
    BERT.names,
    {"position_numbering": "non_padding", "mlm_head_act": "gelu"},
    {"FastBertForMultipleChoice": "hidden_dropout_prob"},
)
DISTILBERT = Family(
    {
        "intermediate_size": "hidden_dim",
        "hidden_act": "activation",
        "hidden_dropout_prob": "dropout",
        "attention_probs_dropout_prob": "attention_dropout",
        "classifier_dropout": "seq_classif_dropout",
    },
    {"layer_norm_eps": 1e-12, "type_vocab_size": 0, "classifier_activation": "relu"},
    {"FastBertForTokenClassification": "dropout"},
)
FAMILIES = {
    "bert": BERT,
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
    "camembert": ROBERTA,
    "distilbert": DISTILBERT,
}


def _problems(config_dict: dict[str, Any], source: PreTrainedConfig, family: Family) -> list[str]:
    """The settings that FastBertConfig cannot express, in words."""
    problems = [
        f"{key} is {value!r}; expected {only!r}"
        for key, only in ONLY_VALUES.items()
        if (value := config_dict.get(key)) != only and value not in (None, [], {})
    ]
    activation = family.names["hidden_act"]
    if (value := getattr(source, activation)) not in ACTIVATION_NAMES:
        problems.append(f"{activation} is {value!r}; expected one of {', '.join(ACTIVATION_NAMES)}")
    width, heads = source.hidden_size, source.num_attention_heads
    if (value := config_dict.get("embedding_size", width)) != width:
        problems.append(f"embedding_size is {value!r}; expected hidden_size, {width}")
    if width % heads:
        problems.append(f"hidden_size is {width}; expected a multiple of the number of attention heads, {heads}")
    if family.fixed.get("position_numbering") == "non_padding" and source.pad_token_id is None:
        problems.append("pad_token_id is None; positions are counted from it")
    return problems


def native_config(config_dict: dict[str, Any], model_type: str) -> dict[str, Any]:
    """Translate the config.json of a member of the family into the fields of `FastBertConfig`.

    Args:
        config_dict: the file's content. Settings that it leaves out have the defaults of Transformers' class.
        model_type: a key of `FAMILIES`.
    Raises:
        ValueError: a value of the wrong type; settings that FastBERT does not have, all of them in one message.
    """
    family, config_class = FAMILIES[model_type], CONFIG_MAPPING[model_type]
    common_names = {entry.name for entry in fields(PreTrainedConfig)}
    own_names = {entry.name for entry in fields(config_class)} - common_names
    own_names |= {*SAME_NAMES, *config_class.attribute_map}
    try:
        source = config_class(**{key: value for key, value in config_dict.items() if key in own_names})
    except StrictDataclassError as error:
        raise ValueError(f"the configuration of a {model_type} holds a wrong value: {error}") from error
    if problems := _problems(config_dict, source, family):
        raise ValueError(f"FastBERT cannot express this {model_type}: {'; '.join(problems)}")
    native_names = {entry.name for entry in fields(FastBertConfig)} - common_names
    read = own_names | native_names | set(ONLY_VALUES) | IRRELEVANT
    rest = {key: value for key, value in config_dict.items() if key not in read}
    return {**rest, **_fields(config_dict.get("architectures"), source, family)}


def _fields(architectures: list[str] | None, source: PreTrainedConfig, family: Family) -> dict[str, Any]:
    names = {name: name for name in SAME_NAMES} | family.names
    native = GEOMETRY | {name: getattr(source, key) for name, key in names.items()} | family.fixed
    heads = [next((ours for end, ours in HEADS.items() if name.endswith(end)), None) for name in architectures or ()]
    native["architectures"] = [head for head in heads if head]
    native["hidden_act"] = ACTIVATION_NAMES[native["hidden_act"]]
    native["classifier_head_dim"] = native["hidden_size"]
    for head in native["architectures"]:
        if head in family.head_dropout:
            native["classifier_dropout"] = getattr(source, family.head_dropout[head])
    if native["classifier_dropout"] is None:
        native["classifier_dropout"] = native["hidden_dropout_prob"]
    return native


class FirstNamed(LoadOnly):
    """Of several tensors that may stand for one, the one whose source pattern comes first."""

    def convert(self, input_dict, source_patterns, target_patterns, **kwargs) -> dict[str, list[Tensor]]:
        stored = next(input_dict[pattern] for pattern in source_patterns if pattern in input_dict)
        return {target_patterns[0]: stored}


# Renamings are applied in turn. None matches a name of the native layout.
ENCODER_NAMES = {
    # old checkpoints
    r"\.LayerNorm\.gamma": ".LayerNorm.weight",
    r"\.LayerNorm\.beta": ".LayerNorm.bias",
    # a model with a head; the loader puts our own prefix where it is needed
    r"^(?:distil)?bert\.": "",
    r"^roberta\.(?!pooler\.)": "",
    r"^embeddings\.LayerNorm\.": "embeddings.norm.",
    r"^(?:encoder|transformer)\.layer\.": "layers.",
}
LAYER_NAMES = {
    # BERT and RoBERTa
    r"\.attention\.self\.": ".attention.",
    r"\.attention\.output\.dense\.": ".attention.output.",
    r"\.attention\.output\.LayerNorm\.": ".attention_norm.",
    r"\.intermediate\.dense\.": ".ffn.dense_in.",
    r"\.output\.dense\.": ".ffn.dense_out.",
    r"\.output\.LayerNorm\.": ".ffn_norm.",
    # DistilBERT
    r"\.attention\.q_lin\.": ".attention.query.",
    r"\.attention\.k_lin\.": ".attention.key.",
    r"\.attention\.v_lin\.": ".attention.value.",
    r"\.attention\.out_lin\.": ".attention.output.",
    r"\.sa_layer_norm\.": ".attention_norm.",
    r"\.ffn\.lin1\.": ".ffn.dense_in.",
    r"\.ffn\.lin2\.": ".ffn.dense_out.",
    r"\.output_layer_norm\.": ".ffn_norm.",
}
HEAD_NAMES = {
    # BERT
    r"^cls\.predictions\.transform\.dense\.": "mlm_head.dense.",
    r"^cls\.predictions\.transform\.LayerNorm\.": "mlm_head.norm.",
    r"^cls\.predictions\.decoder\.weight": "mlm_head.decoder.weight",
    # RoBERTa
    r"^lm_head\.dense\.": "mlm_head.dense.",
    r"^lm_head\.layer_norm\.": "mlm_head.norm.",
    r"^lm_head\.decoder\.weight": "mlm_head.decoder.weight",
    r"^classifier\.out_proj\.": "classifier.",
    # DistilBERT
    r"^vocab_transform\.": "mlm_head.dense.",
    r"^vocab_layer_norm\.": "mlm_head.norm.",
    r"^vocab_projector\.": "mlm_head.decoder.",
    r"^pre_classifier\.": "pooler.dense.",
}
# what may be stored under several names at once: the first is the one that the original uses
ALTERNATIVES = {
    "mlm_head.decoder.bias": [
        r"^cls\.predictions\.decoder\.bias",
        r"^cls\.predictions\.bias",
        r"^lm_head\.decoder\.bias",
        r"^lm_head\.bias",
    ],
    # RoBERTa classifies sequences by a dense layer of its own, choices by its pooler
    "pooler.dense.weight": [r"^classifier\.dense\.weight", r"^roberta\.pooler\.dense\.weight"],
    "pooler.dense.bias": [r"^classifier\.dense\.bias", r"^roberta\.pooler\.dense\.bias"],
}


def weight_conversions() -> list[WeightRenaming | WeightConverter]:
    """From the names of the family's tensors to ours."""
    renamings = ENCODER_NAMES | LAYER_NAMES | HEAD_NAMES
    return [
        *(WeightRenaming(source, target) for source, target in renamings.items()),
        *(WeightConverter(sources, target, [FirstNamed()]) for target, sources in ALTERNATIVES.items()),
    ]


for _model_type in FAMILIES:
    FastBertConfig.foreign_layouts[_model_type] = partial(native_config, model_type=_model_type)
# before the published layout's, which call every name that begins with "encoder." theirs
_published = get_checkpoint_conversion_mapping(FastBertConfig.model_type)
register_checkpoint_conversion_mapping(
    FastBertConfig.model_type, [*weight_conversions(), *_published], overwrite=True
)
