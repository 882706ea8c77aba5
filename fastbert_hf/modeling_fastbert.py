# Copyright 2026 The FastBERT authors. Licensed under the MIT License.
"""FastBERT: an encoder whose feed-forward layers are trees of neurons, and its five heads.

    input_ids (B, T) -> embeddings -> hidden (B, T, H) -> L layers -> final norm -> head -> logits

The parts of a layer are in encoder_fastbert.py, those of the heads in heads_fastbert.py, the trees in fff_layer.py
and leaf_layer.py.
Sizes: B batch, T tokens, H hidden,
V vocabulary. Source: arXiv 2311.10770.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .checkpoint_fastbert import misfits
from .configuration_fastbert import FastBertConfig
from .encoder_fastbert import FastBertAttention, FastBertEmbeddings, FastBertLayer, sinusoidal_positions, visible_keys
from .fff_layer import FastFeedForward
from .heads_fastbert import FastBertMLMHead, FastBertPooler, labelled_positions
from .leaf_layer import LeafFeedForward


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
    _keys_to_ignore_on_load_unexpected = [r"self_attention\.norm_factor$"]  # a constant in the published layout
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
        superfluous where this class has no such head. Callers who pass `output_loading_info` or `key_mapping` judge
        for themselves.

        Raises:
            ValueError: missing or unexpected tensors, by name; tensors of another shape, unless
                `ignore_mismatched_sizes` asks for new ones in their place.
        """
        if kwargs.get("output_loading_info") or kwargs.get("key_mapping"):
            return cls._from_safetensors(pretrained_model_name_or_path, *args, **kwargs)
        replace_mismatched = kwargs.pop("ignore_mismatched_sizes", False)
        model, info = cls._from_safetensors(
            pretrained_model_name_or_path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        problems = misfits(model, info, cls._head_prefixes, replace_mismatched)
        if problems:
            raise ValueError(
                f"the tensors in {pretrained_model_name_or_path} do not fit its configuration: {'; '.join(problems)}"
            )
        return model

    @classmethod
    def _from_safetensors(cls, pretrained_model_name_or_path, *args, **kwargs):
        """PreTrainedModel's from_pretrained, but pickled weights, which can run code when opened, are never read."""
        reason = "FastBERT reads safetensors only: a pickle (pytorch_model.bin) can run code when it is opened"
        if kwargs.get("use_safetensors") is False:
            raise ValueError(f"use_safetensors is False; expected None or True. {reason}")
        kwargs["use_safetensors"] = True
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except OSError as error:
            if "no file named" not in str(error) and "be loaded with `safetensors`" not in str(error):
                raise
            raise OSError(f"{pretrained_model_name_or_path} holds no model.safetensors. {reason}") from error

    def save_pretrained(self, save_directory, *args, save_original_format: bool = False, **kwargs):
        """As in PreTrainedModel; always the native layout, whatever layout the weights were loaded from."""
        super().save_pretrained(save_directory, *args, save_original_format=save_original_format, **kwargs)


class FastBertModel(FastBertPreTrainedModel):
    """The bare encoder."""

    _keys_to_ignore_on_load_unexpected = [
        *FastBertPreTrainedModel._keys_to_ignore_on_load_unexpected,
        *(rf"^{prefix}" for prefix in FastBertPreTrainedModel._head_prefixes),
    ]

    def __init__(self, config: FastBertConfig):
        super().__init__(config)
        self.embeddings = FastBertEmbeddings(config)
        self.layers = nn.ModuleList([FastBertLayer(config) for _ in range(config.num_hidden_layers)])
        self.final_norm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.final_norm else nn.Identity()
        )
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding):
        self.embeddings.word_embeddings = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutput:
        """Encode a batch.

        Args:
            input_ids: (B, T) int64, or inputs_embeds: (B, T, H) in its place.
            attention_mask: (B, T) or (B, T, T), nonzero where a key is visible; or (B, 1 or heads, T, T), boolean or
                additive, used as it is. None sees everything.
            token_type_ids: (B, T); ignored where type_vocab_size is 0.
            position_ids: (T,) or (B, T); 0..T-1 by default.
            output_hidden_states, output_attentions, return_dict: as everywhere in Transformers.
        Returns: last_hidden_state (B, T, H) and what was asked for.
        Raises:
            ValueError: not exactly one of input_ids and inputs_embeds; more tokens than positions.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        hidden = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds)
        if attention_mask is not None and attention_mask.dim() < 4:
            if attention_mask.dim() < 2 or attention_mask.shape[-1] != hidden.shape[1]:
                raise ValueError(
                    f"attention_mask is {tuple(attention_mask.shape)}; expected (B, T) or (B, T, T) with T = "
                    f"{hidden.shape[1]}"
                )
            attention_mask = visible_keys(attention_mask)
        if attention_mask is not None and attention_mask.dim() == 3:
            attention_mask = attention_mask.unsqueeze(1)  # (B, T, T) -> (B, 1, T, T)
        attention_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden, attention_mask=attention_mask
        )
        for layer in self.layers:
            hidden = layer(hidden, attention_mask, **kwargs)
        return BaseModelOutput(last_hidden_state=self.final_norm(hidden))


class FastBertForMaskedLM(FastBertPreTrainedModel):
    """The encoder with a masked language modelling head."""

    _tied_weights_keys = {"mlm_head.decoder.weight": "fastbert.embeddings.word_embeddings.weight"}

    def __init__(self, config: FastBertConfig):
        super().__init__(config)
        self.fastbert = FastBertModel(config)
        self.mlm_head = FastBertMLMHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.mlm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear):
        self.mlm_head.decoder = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs,
    ) -> MaskedLMOutput:
        """Predict tokens. Arguments as in `FastBertModel.forward`, and labels (B, T), -100 where there is none.

        Returns: logits (B, T, V) and, with labels, the mean cross-entropy (the sum over `num_items_in_batch` where
            that is given). While training with `sparse_prediction` above 0 the decoder runs on labelled positions
            only: logits are then (labelled positions, V), the loss is the same.
        """
        outputs = self.fastbert(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, return_dict=True, **kwargs
        )
        hidden = outputs.last_hidden_state
        if labels is not None and self.training and self.config.sparse_prediction > 0:
            labels = labels.reshape(-1).to(hidden.device)
            selected = labelled_positions(labels, self.config.sparse_prediction)
            hidden, labels = hidden.flatten(0, 1)[selected], labels[selected]  # (B, T, H) -> (labelled, H)
        logits = self.mlm_head(hidden)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(loss, logits, outputs.hidden_states, outputs.attentions)


class FastBertForSequenceClassification(FastBertPreTrainedModel):
    """The encoder with a classification or regression head on the pooled sequence."""

    accepts_loss_kwargs = False  # regression and multi-label losses are means: Trainer divides by its accumulation

    def __init__(self, config: FastBertConfig):
        super().__init__(config)
        self.fastbert = FastBertModel(config)
        self.pooler = FastBertPooler(config)
        self.classifier = nn.Linear(self.pooler.output_dim, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        """Classify. Arguments as in `FastBertModel.forward`, and labels: (B,) classes, (B,) or (B, 1) float targets
        when num_labels is 1 (mean squared error), or (B, num_labels) float (binary cross-entropy).

        Returns: logits (B, num_labels) and, with labels, the loss of `config.problem_type`.
        """
        outputs = self.fastbert(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, return_dict=True, **kwargs
        )
        logits = self.classifier(self.pooler(outputs.last_hidden_state, attention_mask))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)


class FastBertForTokenClassification(FastBertPreTrainedModel):
    """The encoder with a classification head on every token."""

    def __init__(self, config: FastBertConfig):
        super().__init__(config)
        self.fastbert = FastBertModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs,
    ) -> TokenClassifierOutput:
        """Classify tokens. Arguments as in `FastBertModel.forward`, and labels (B, T), -100 where there is none.

        Returns: logits (B, T, num_labels) and, with labels, the cross-entropy.
        """
        outputs = self.fastbert(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, return_dict=True, **kwargs
        )
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config, **kwargs)
        return TokenClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)


class FastBertForQuestionAnswering(FastBertPreTrainedModel):
    """The encoder with a head for the start and the end of an answer span."""

    accepts_loss_kwargs = False

    def __init__(self, config: FastBertConfig):
        super().__init__(config)
        self.fastbert = FastBertModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **kwargs,
    ) -> QuestionAnsweringModelOutput:
        """Find a span. Arguments as in `FastBertModel.forward`, and start_positions, end_positions (B,).

        Returns: start_logits and end_logits (B, T) and, with positions, the mean of their cross-entropies.
        """
        outputs = self.fastbert(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, return_dict=True, **kwargs
        )
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(
            dim=-1
        )  # (B, T, 2) -> 2 x (B, T)
        start_logits, end_logits = start_logits.contiguous(), end_logits.contiguous()
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions)
        return QuestionAnsweringModelOutput(loss, start_logits, end_logits, outputs.hidden_states, outputs.attentions)


class FastBertForMultipleChoice(FastBertPreTrainedModel):
    """The encoder with one score for each of several choices."""

    accepts_loss_kwargs = False

    def __init__(self, config: FastBertConfig):
        super().__init__(config)
        self.fastbert = FastBertModel(config)
        self.pooler = FastBertPooler(config)
        self.classifier = nn.Linear(self.pooler.output_dim, 1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs,
    ) -> MultipleChoiceModelOutput:
        """Choose. Every input has a choice dimension after the batch, (B, choices, T); labels (B,).

        Returns: logits (B, choices) and, with labels, the cross-entropy.
        """
        example = input_ids if input_ids is not None else inputs_embeds
        if example is None or example.dim() != (3 if input_ids is not None else 4):
            raise ValueError("expected input_ids (B, choices, T) or inputs_embeds (B, choices, T, H)")
        num_choices = example.shape[1]
        # (B, choices, T) -> (B * choices, T)
        input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds = (
            t if t is None else t.flatten(0, 1)
            for t in (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        )
        outputs = self.fastbert(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, return_dict=True, **kwargs
        )
        logits = self.classifier(self.pooler(outputs.last_hidden_state, attention_mask))  # (B * choices, 1)
        logits = logits.view(-1, num_choices)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return MultipleChoiceModelOutput(loss, logits, outputs.hidden_states, outputs.attentions)


__all__ = [
    "FastBertForMaskedLM",
    "FastBertForMultipleChoice",
    "FastBertForQuestionAnswering",
    "FastBertForSequenceClassification",
    "FastBertForTokenClassification",
    "FastBertModel",
    "FastBertPreTrainedModel",
]
