"""FastBERT: BERT whose feed-forward layers are trees of neurons, for Hugging Face Transformers.

`import fastbert_hf` registers configuration, models and the published checkpoint layout with the Auto classes.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from fastbert_hf import bert_layouts, published_layout  # noqa: F401  importing registers them
from fastbert_hf.configuration_fastbert import FastBertConfig
from fastbert_hf.fff_layer import FastFeedForward
from fastbert_hf.fff_op import fff, use_backend
from fastbert_hf.leaf_layer import LeafFeedForward
from fastbert_hf.leaf_op import leaf_trees
from fastbert_hf.modeling_fastbert import (
    FastBertForMaskedLM,
    FastBertForMultipleChoice,
    FastBertForQuestionAnswering,
    FastBertForSequenceClassification,
    FastBertForTokenClassification,
    FastBertModel,
    FastBertPreTrainedModel,
)
from fastbert_hf.quantized_layer import QuantizedFastFeedForward, QuantizedLeafFeedForward
from fastbert_hf.quantizer_fastbert import FastBertQuantizationConfig, prepare_for_inference

crammed = published_layout  # its earlier name

__version__ = "0.1.0"

AutoConfig.register(FastBertConfig.model_type, FastBertConfig)
FastBertConfig.register_for_auto_class("AutoConfig")
for _auto_class, _model_class in (
    (AutoModel, FastBertModel),
    (AutoModelForMaskedLM, FastBertForMaskedLM),
    (AutoModelForSequenceClassification, FastBertForSequenceClassification),
    (AutoModelForTokenClassification, FastBertForTokenClassification),
    (AutoModelForQuestionAnswering, FastBertForQuestionAnswering),
    (AutoModelForMultipleChoice, FastBertForMultipleChoice),
):
    _auto_class.register(FastBertConfig, _model_class)
    _model_class.register_for_auto_class(_auto_class.__name__)  # saved models carry their code

__all__ = [
    "FastBertConfig",
    "FastBertForMaskedLM",
    "FastBertForMultipleChoice",
    "FastBertForQuestionAnswering",
    "FastBertForSequenceClassification",
    "FastBertForTokenClassification",
    "FastBertModel",
    "FastBertPreTrainedModel",
    "FastBertQuantizationConfig",
    "FastFeedForward",
    "LeafFeedForward",
    "QuantizedFastFeedForward",
    "QuantizedLeafFeedForward",
    "crammed",
    "fff",
    "leaf_trees",
    "prepare_for_inference",
    "use_backend",
]
