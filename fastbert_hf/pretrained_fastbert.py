# Copyright 2026 The FastBERT authors. Licensed under the MIT License.
"""What every FastBERT model does alike: initial weights, loading and saving."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .checkpoint_fastbert import CheckpointMismatchError, check_named_files, misfits
from .configuration_fastbert import FastBertConfig
from .encoder_fastbert import FastBertAttention, FastBertEmbeddings, FastBertLayer, sinusoidal_positions
from .fff_layer import FastFeedForward
from .inference_fastbert import check_plain, fuse_layers, replace_layers, warn_of_slow_parts
from .leaf_layer import LeafFeedForward
from .quantizer_fastbert import FastBertQuantizationConfig, FastBertQuantizer, check_prepared_as_wanted


class FastBertPreTrainedModel(PreTrainedModel):
    config: FastBertConfig
    base_model_prefix = "fastbert"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["FastBertEmbeddings", "FastBertLayer"]
    _can_record_outputs = {"hidden_states": FastBertLayer, "attentions": FastBertAttention}
    _keys_to_ignore_on_load_unexpected = [
        r"self_attention\.norm_factor$",  # a constant in the published layout
        r"(^|\.)position_ids$",  # 0, 1, 2, ... in old checkpoints of BERT
        r"^cls\.seq_relationship\.",  # BERT's next sentence prediction, which no head here has
    ]
    # tensors of the heads: absent from, or superfluous in, a checkpoint of another head
    _head_prefixes = ("mlm_head.", "pooler.", "classifier.", "qa_outputs.")

    def __init__(self, config: FastBertConfig, *args, **kwargs):
        config.validate_ranges()  # again: values may have been assigned since the configuration was made
        config.validate_combinations()
        super().__init__(config, *args, **kwargs)

    def post_init(self):
        super().post_init()  # which adds what the encoder inside may ignore: a head's own tensors among it
        self._keys_to_ignore_on_load_unexpected = set(type(self)._keys_to_ignore_on_load_unexpected)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, FastFeedForward):
            init.normal_(module.weight_in, std=self.config.initializer_range)
            init.normal_(module.weight_out, std=self.config.initializer_range)
            if module.bias_in is not None:
                init.zeros_(module.bias_in)
        elif isinstance(module, LeafFeedForward):
            init.normal_(module.router, std=module.router_std)
            init.normal_(module.weight_in, std=self.config.initializer_range)
            init.normal_(module.weight_out, std=self.config.initializer_range)
            for bias in (module.threshold, module.bias_in, module.bias_out):
                if bias is not None:
                    init.zeros_(bias)
        elif isinstance(module, FastBertEmbeddings) and module.sinusoidal:
            init.constant_(module.position_scale, module.hidden_size**-0.5)
            init.copy_(module.positions, sinusoidal_positions(module.max_positions, module.hidden_size))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in PreTrainedModel, but a checkpoint that lacks encoder tensors, or holds unknown ones, is an error.

        Tensors of a head may be absent where the checkpoint is of another class (a new head is initialised) and
        superfluous where this class has no such head. Callers who pass `output_loading_info`, `key_mapping` or, in
        place of a checkpoint, None and a `state_dict` judge for themselves.

        Raises:
            CheckpointMismatchError: missing or unexpected tensors, by name; tensors of another shape, unless
                `ignore_mismatched_sizes` asks for new ones in their place. It is a ValueError and, as
                Transformers' own error for a wrong shape, a RuntimeError.
            ValueError: an index of weight files that names something else than safetensors files beside it; a
                `quantization_config` for a folder that was prepared in another way.
        """
        given = pretrained_model_name_or_path is None
        if given or kwargs.get("output_loading_info") or kwargs.get("key_mapping"):
            return cls._from_safetensors(pretrained_model_name_or_path, *args, **kwargs)
        replace_mismatched = kwargs.pop("ignore_mismatched_sizes", False)
        model, info = cls._from_safetensors(
            pretrained_model_name_or_path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        problems = misfits(model, info, cls._head_prefixes, replace_mismatched)
        if problems:
            raise CheckpointMismatchError(
                f"the tensors in {pretrained_model_name_or_path} do not fit its configuration: {'; '.join(problems)}"
            )
        return model

    @classmethod
    def _from_safetensors(cls, pretrained_model_name_or_path, *args, **kwargs):
        """PreTrainedModel's from_pretrained, but it reads safetensors files of the folder or repository alone.

        Pickled weights, which can run code when opened, are never read, nor is a file that an index names elsewhere.
        """
        reason = "FastBERT reads safetensors only: a pickle (pytorch_model.bin) can run code when it is opened"
        if kwargs.get("use_safetensors") is False:
            raise ValueError(f"use_safetensors is False; expected None or True. {reason}")
        kwargs["use_safetensors"] = True
        wanted = kwargs.get("quantization_config")
        if pretrained_model_name_or_path is not None:
            check_named_files(pretrained_model_name_or_path, kwargs)
        try:
            loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
            check_prepared_as_wanted(loaded[0] if isinstance(loaded, tuple) else loaded, wanted)
            return loaded
        except OSError as error:
            if "no file named" not in str(error) and "be loaded with `safetensors`" not in str(error):
                raise
            convert = "import transformers as t; t.CLASS.from_pretrained('OLD').save_pretrained('NEW')"
            raise OSError(
                f"{pretrained_model_name_or_path} holds no model.safetensors. {reason}. Where you trust it, this "
                f'writes safetensors: python -c "{convert}", with the CLASS that config.json names in "architectures"'
            ) from error

    def prepare_for_inference(self, dtype: str = "int8", linear_dtype: str | None = None):
        """Make this model ready to serve from a CPU, in place; see the function in quantizer_fastbert.py."""
        wanted = FastBertQuantizationConfig(dtype, linear_dtype)
        if self.is_prepared:
            found = self.hf_quantizer.quantization_config
            if found.to_dict() != wanted.to_dict():
                raise ValueError(
                    f"the model is prepared for inference already, with {_described(found)}; to prepare it with "
                    f"{_described(wanted)}, load the float model again"
                )
            return self
        if "int8" in (wanted.dtype, wanted.linear_dtype) and self.device.type != "cpu":
            raise ValueError(f"the model is on {self.device}; int8 weights are for the CPU")
        check_plain(self.base_model)
        self.float()
        self.hf_quantizer = FastBertQuantizer(wanted, pre_quantized=False)
        self.quantization_method = wanted.quant_method
        self.hf_quantizer.postprocess_model(self)
        return self

    @property
    def is_prepared(self) -> bool:
        """Whether the model is prepared for inference."""
        return getattr(self, "hf_quantizer", None) is not None

    def replace_layers_for_inference(self, wanted: FastBertQuantizationConfig, empty: bool = False) -> None:
        """The first step of preparing, which from_pretrained takes too: `inference_fastbert.replace_layers`."""
        replace_layers(self.base_model, wanted.dtype, wanted.linear_dtype, empty)

    def fuse_layers_for_inference(self, quantizer: FastBertQuantizer) -> None:
        """The last step, once the weights are there."""
        wanted = quantizer.quantization_config
        fuse_layers(self.base_model, wanted.dtype, wanted.linear_dtype)
        warn_of_slow_parts(self.base_model, wanted.linear_dtype)
        self.requires_grad_(False)
        for model in (self, self.base_model):
            model.hf_quantizer, model.is_quantized = quantizer, True
        self.eval()

    def train(self, mode: bool = True):
        """As in PreTrainedModel.

        Raises:
            ValueError: the model is prepared for inference.
        """
        if mode and self.is_prepared:
            raise ValueError("the model is prepared for inference and cannot be trained: load the float model again")
        return super().train(mode)

    def save_pretrained(self, save_directory, *args, save_original_format: bool = False, **kwargs):
        """As in PreTrainedModel; always the native layout, whatever layout the weights were loaded from."""
        super().save_pretrained(save_directory, *args, save_original_format=save_original_format, **kwargs)


def _described(prepared: FastBertQuantizationConfig) -> str:
    return f"dtype {prepared.dtype!r} and linear_dtype {prepared.linear_dtype!r}"


__all__ = ["FastBertPreTrainedModel"]
