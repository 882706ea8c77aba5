# Copyright 2026 The FastBERT authors. Licensed under the MIT License.
"""Models prepared for inference as Transformers knows them: a quantization_config, which a saved model carries.

Importing this registers the method "fastbert" with Transformers. `from_pretrained` then loads a prepared folder as it
is, and prepares a float one with `quantization_config=FastBertQuantizationConfig(dtype)`.

This file travels with models on the Hub, so one process may hold several copies of it. The first registers; it asks
the model, whose own code knows its layers.
"""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .inference_fastbert import DTYPES

METHOD = "fastbert"


class FastBertQuantizationConfig(QuantizationConfigMixin):
    """How a model is prepared for inference.

    Args:
        dtype: "float32", "bfloat16" or "int8"; see inference_fastbert.py.
        linear_dtype: that of the linear layers; None means dtype.
    Raises:
        ValueError: another dtype, or a key that this version does not know.
    """

    def __init__(self, dtype: str = "int8", linear_dtype: str | None = None, quant_method: str = METHOD, **unknown):
        self.dtype, self.linear_dtype = dtype, dtype if linear_dtype is None else linear_dtype
        for name in ("dtype", "linear_dtype"):
            if getattr(self, name) not in DTYPES:
                expected = ", ".join(map(repr, DTYPES))
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {expected}")
        if quant_method != METHOD or unknown:
            raise ValueError(
                f"quantization_config has {unknown or quant_method!r}; this version knows quant_method {METHOD!r}, "
                "dtype and linear_dtype"
            )
        self.quant_method = METHOD


class FastBertQuantizer(HfQuantizer):
    """Prepares a model while it is loaded. Weights are read in float32; those that are stored in int8 stay int8."""

    quantization_config: FastBertQuantizationConfig

    def validate_environment(self, *args, device_map=None, **kwargs):
        devices = device_map.values() if isinstance(device_map, dict) else [device_map]
        if any(device is not None and torch.device(device).type != "cpu" for device in devices if device != "auto"):
            raise ValueError(f"device_map is {device_map!r}; models prepared for inference run on the CPU")

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs):
        if self.pre_quantized:
            model.replace_layers_for_inference(self.quantization_config, empty=True)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs):
        if not self.pre_quantized:
            model.replace_layers_for_inference(self.quantization_config)
        model.fuse_layers_for_inference(self)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def prepare_for_inference(model: nn.Module, dtype: str = "int8", linear_dtype: str | None = None) -> nn.Module:
    """Make a model ready to serve from a CPU, in place.

    Its layers take one product for query, key and value, and trees and linear layers compute in the types that are
    asked for. Heads, embeddings and norms stay float32; see inference_fastbert.py. Saved, the model is a folder that
    loads prepared. It can no longer be trained.

    Args:
        model: a FastBERT model of any head, or a module that holds one, such as a SentenceTransformer.
        dtype: "float32", "bfloat16" or "int8". linear_dtype: the same for the linear layers; None means dtype.
    Returns: `model`, in evaluation mode.
    Raises:
        ValueError: another dtype, a module without a FastBERT model, one that is prepared in another dtype, holds
            adapters that are not merged, has weights that are not finite, or for int8 is not on the CPU.
    """
    if hasattr(model, "fuse_layers_for_inference"):
        return model.prepare_for_inference(dtype, linear_dtype)
    found, inside = [], set()
    for module in model.modules():  # from the outside: a head before the encoder that it holds
        if hasattr(module, "fuse_layers_for_inference") and module not in inside:
            found.append(module)
            inside.update(module.modules())
    if not found:
        raise ValueError(f"a {type(model).__name__} holds no FastBERT model; expected one to prepare for inference")
    for module in found:
        module.prepare_for_inference(dtype, linear_dtype)
    return model.eval()


def check_prepared_as_wanted(model: PreTrainedModel, wanted: QuantizationConfigMixin | dict | None) -> None:
    """Check a loaded model against the `quantization_config` that `from_pretrained` was called with.

    Transformers warns where a stored one differs, and takes the stored one.

    Raises:
        ValueError: the model was prepared in another way before it was saved.
    """
    wanted = wanted.to_dict() if isinstance(wanted, QuantizationConfigMixin) else wanted
    if wanted is None or wanted.get("quant_method") != METHOD:
        return
    wanted = FastBertQuantizationConfig(**wanted).to_dict()
    found = model.config.quantization_config.to_dict()
    if found != wanted:
        raise ValueError(f"the stored model is prepared for inference with {found}; expected {wanted}")


if METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(METHOD)(FastBertQuantizationConfig)
    register_quantizer(METHOD)(FastBertQuantizer)

__all__ = ["FastBertQuantizationConfig", "FastBertQuantizer", "prepare_for_inference"]
