"""The published layout: checkpoints with `model_type: crammedBERT` load as FastBERT.

Importing this module teaches AutoConfig the model type, `FastBertConfig` the configuration and Transformers' loader
the tensors. Such a checkpoint holds the tied word embedding once or twice, query, key and value in one matrix whose
rows run head by head, and the output side of the trees transposed. Saving always writes the native layout.
Source: the code and weights of arXiv 2311.10770 and, for dense models, arXiv 2212.14034.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

from fastbert_hf.configuration_fastbert import FastBertConfig

MODEL_TYPE = "crammedBERT"

CLASS_NAMES = {
    "ScriptableLMForPreTraining": "FastBertForMaskedLM",
    "ScriptableLMForSequenceClassification": "FastBertForSequenceClassification",
}
ACTIVATION_NAMES = {"GELU": "gelu", "ReLU": "relu", "SiLU": "silu"}  # torch.nn classes
POOLING_NAMES = {"zero_index": "cls", "avg": "mean_all", "max": "max", "lse": "lse"}
# what the published code can vary and this model does not: the only value accepted, by path in `arch`
FIXED_CHOICES = {
    "attention.type": ("self-attention",),
    "attention.causal_attention": (False,),
    "attention.rotary_embedding": (False,),
    "attention.skip_output_projection": (False,),
    "attention.sequence_op": ("torch-softmax",),
    "classification_head.nonlin": ("Tanh",),
    "embedding.pos_embedding": ("scaled-sinusoidal",),
    "init.type": ("normal",),
    "norm": ("LayerNorm", "ApexLayerNorm"),
    "objective_layout": ("MLM",),
}


def _lookup(arch: dict[str, Any], path: str, default: Any = None) -> Any:
    value = arch
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return default if value is None else value


def _chosen(arch: dict[str, Any], path: str, names: dict[str, str]) -> str:
    value = _lookup(arch, path)
    if value not in names:
        raise ValueError(f"arch.{path} is {value!r}; expected one of {', '.join(names)}")
    return names[value]


def _feed_forward(arch: dict[str, Any]) -> dict[str, Any]:
    """The fields of FastBertConfig that describe the feed-forward block."""
    kind = arch.get("intermed_type") or "ff"
    if kind not in ("ff", "fff"):
        raise ValueError(f"arch.intermed_type is {kind!r}; expected 'fff' or 'ff'")
    activation, gate, _ = arch["nonlin"].partition("glu")  # "GELUglu" is a gated GELU
    fields: dict[str, Any] = {"hidden_act": _chosen({"nonlin": activation}, "nonlin", ACTIVATION_NAMES)}
    if kind == "fff":
        if gate:
            raise ValueError(f"arch.nonlin is {arch['nonlin']!r}; trees have no gated units")
        return {**fields, "ffn_type": "fff", "fff_depth": arch["intermed_depth"], "fff_trees": arch["intermed_size"]}
    width = arch["intermed_size"] // 2 if gate else arch["intermed_size"]
    return {**fields, "ffn_type": "dense", "intermediate_size": width, "dense_gated": bool(gate)}


def native_config(config_dict: dict[str, Any]) -> dict[str, Any]:
    """Translate the config.json of the published layout into the fields of `FastBertConfig`.

    Args:
        config_dict: the file's content; the architecture is under "arch".
    Raises:
        ValueError: no "arch", a required key missing from it, or a choice that FastBERT does not have.
    """
    outer = dict(config_dict)
    arch = outer.pop("arch", None)
    outer["architectures"] = [CLASS_NAMES[name] for name in outer.get("architectures") or () if name in CLASS_NAMES]
    if not isinstance(arch, dict):
        raise ValueError(f"a {MODEL_TYPE} configuration needs a dictionary 'arch'; got {arch!r}")
    for path, allowed in FIXED_CHOICES.items():
        value = _lookup(arch, path)
        if value is not None and value not in allowed:
            raise ValueError(f"arch.{path} is {value!r}; expected {' or '.join(map(repr, allowed))}")
    for name in ("model_type", "vocab_size", "transformers_version"):
        outer.pop(name, None)
    try:
        return {**outer, **_fields(arch)}
    except KeyError as error:
        raise ValueError(f"arch has no key {error}, which a {MODEL_TYPE} configuration needs") from error
    except (TypeError, AttributeError) as error:
        raise ValueError(f"arch holds a value of the wrong type: {error}") from error


def _fields(arch: dict[str, Any]) -> dict[str, Any]:
    embedding, attention = arch["embedding"], arch["attention"]
    if embedding["embedding_dim"] != arch["hidden_size"]:
        raise ValueError(
            f"arch.embedding.embedding_dim is {embedding['embedding_dim']}; expected arch.hidden_size, "
            f"{arch['hidden_size']}"
        )
    if bool(attention["qkv_bias"]) != bool(arch["use_bias"]):
        raise ValueError(f"arch.attention.qkv_bias is {attention['qkv_bias']}; expected arch.use_bias")
    head = arch.get("classification_head") or {}
    pooling = {"classifier_pooling": _chosen(head, "pooler", POOLING_NAMES)} if "pooler" in head else {}
    return {
        "vocab_size": embedding["vocab_size"],
        "hidden_size": arch["hidden_size"],
        "num_hidden_layers": arch["num_transformer_layers"],
        "num_attention_heads": attention["num_attention_heads"],
        "max_position_embeddings": embedding["max_seq_length"],
        **_feed_forward(arch),
        "fff_bias": True,
        "norm_scheme": "pre",  # the key arch.norm_scheme is not read by the published code
        "embedding_norm": bool(embedding["normalization"]),
        "final_norm": bool(arch["final_norm"]),
        "layer_norm_eps": float(arch["norm_eps"]),
        "position_embedding_type": "scaled_sinusoidal",
        "type_vocab_size": 0,
        "use_bias": bool(arch["use_bias"]),
        "mlm_head_transform": not arch["skip_head_transform"],
        "decoder_bias": bool(arch["decoder_bias"]),
        "sparse_prediction": float(arch.get("sparse_prediction") or 0.0),
        **pooling,
        "classifier_head_dim": head.get("head_dim") if head.get("include_ff_layer", True) else None,
        "classifier_dropout": float(head.get("classifier_dropout", 0.1)),
        "hidden_dropout_prob": float(arch["hidden_dropout_prob"]),
        "attention_probs_dropout_prob": float(attention["dropout_prob"]),
        "embedding_dropout_prob": float(embedding["dropout_prob"]),
        "initializer_range": float(_lookup(arch, "init.std", 0.02)),
        "pad_token_id": embedding["pad_token_id"],
        "tie_word_embeddings": True,  # the published code ties whatever arch.tie_weights says
    }


class CrammedBertConfig(PreTrainedConfig):
    """What AutoConfig finds under the published model type: it loads as a `FastBertConfig`."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> FastBertConfig:
        return FastBertConfig.from_dict(config_dict, **kwargs)


class LoadOnly(ConversionOps):
    """A conversion without a way back: FastBERT never saves the published layout."""

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("FastBERT is saved in its native layout only")


class SplitHeadwise(LoadOnly):
    """Split a fused projection whose rows are q, k, v of head 0, then of head 1, ...: (3H, ...) -> 3 x (H, ...)."""

    def convert(self, input_dict, source_patterns, target_patterns, config, **kwargs) -> dict[str, list[Tensor]]:
        (fused,) = next(iter(input_dict.values()))
        heads = config.num_attention_heads
        by_head = fused.unflatten(0, (heads, 3, -1))  # (3H, ...) -> (heads, 3, d, ...)
        parts = by_head.unbind(1)
        return {name: [part.flatten(0, 1).contiguous()] for name, part in zip(target_patterns, parts)}


class TransposeRows(LoadOnly):
    """(H_out, P*n) -> (P*n, H_out), contiguous: kernels read parameter rows in place."""

    def convert(self, input_dict, source_patterns, target_patterns, **kwargs) -> dict[str, list[Tensor]]:
        (matrix,) = next(iter(input_dict.values()))
        return {target_patterns[0]: [matrix.t().contiguous()]}


class FirstStored(LoadOnly):
    """The tied word embedding, stored as either or both of two tensors, which must then be equal."""

    def convert(self, input_dict, source_patterns, target_patterns, **kwargs) -> dict[str, list[Tensor]]:
        stored = [tensor for tensors in input_dict.values() for tensor in tensors]
        if any(not torch.equal(stored[0], other) for other in stored[1:]):
            raise ValueError("the two stored copies of the tied word embedding differ")
        return {target_patterns[0]: [stored[0]]}


def weight_conversions() -> list[WeightRenaming | WeightConverter]:
    """From the published tensor names to ours: every renaming is applied in turn, then at most one conversion."""
    renamings = {
        r"_orig_mod\.": "",  # compiled models were saved under this prefix
        r"^encoder\.embedding\.pos_embedding\.scale_factor": "fastbert.embeddings.position_scale",
        r"^encoder\.embedding\.": "fastbert.embeddings.",
        r"^encoder\.": "fastbert.",
        r"\.norm1\.": ".attention_norm.",
        r"\.norm2\.": ".ffn_norm.",
        r"\.attn\.dense\.": ".attention.output.",
        r"\.ffn\.linear_in\.weight": ".ffn.weight_in",
        r"\.ffn\.linear_in\.bias": ".ffn.bias_in",
        r"^prediction_head\.": "mlm_head.",
        r"^decoder\.bias": "mlm_head.decoder.bias",
        r"^head\.": "classifier.",
    }
    fused = "attn.self_attention.query_key_value."
    split = [f"attention.{name}." for name in ("query", "key", "value")]
    return [
        *(WeightRenaming(source, target) for source, target in renamings.items()),
        *(
            WeightConverter(fused + kind, [name + kind for name in split], [SplitHeadwise()])
            for kind in ("weight", "bias")
        ),
        WeightConverter(r"ffn\.linear_out\.weight", "ffn.weight_out", [TransposeRows()]),
        WeightConverter(
            [r"embeddings\.word_embedding\.weight", r"^decoder\.weight"],
            "embeddings.word_embeddings.weight",
            [FirstStored()],
        ),
    ]


AutoConfig.register(MODEL_TYPE, CrammedBertConfig)
FastBertConfig.foreign_layouts[MODEL_TYPE] = native_config
register_checkpoint_conversion_mapping(FastBertConfig.model_type, weight_conversions())
