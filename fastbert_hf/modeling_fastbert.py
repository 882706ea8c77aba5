# Copyright 2026 The FastBERT authors. Licensed under the MIT License.
"""FastBERT: an encoder whose feed-forward layers are trees of neurons, and its five heads.

    input_ids (B, T) -> embeddings -> hidden (B, T, H) -> L layers -> final norm -> head -> logits

The parts of a layer are in encoder_fastbert.py, those of the heads in heads_fastbert.py, the trees in fff_layer.py
and leaf_layer.py, loading and saving in pretrained_fastbert.py, checks of the input in inputs_fastbert.py.
Sizes: B batch, T tokens, H hidden, V vocabulary. Source: arXiv 2311.10770.
"""

from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_fastbert import FastBertConfig
from .encoder_fastbert import FastBertEmbeddings, FastBertLayer, visible_keys
from .heads_fastbert import FastBertMLMHead, FastBertPooler, labelled_positions
from .inputs_fastbert import check_mask, check_sequence_labels, check_shape, class_loss
from .pretrained_fastbert import FastBertPreTrainedModel


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
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        """Encode a batch.

        Args:
            input_ids: (B, T) int64, or inputs_embeds: (B, T, H) in its place.
            attention_mask: (B, T) or (B, T, T), nonzero where a key is visible; or (B, 1 or heads, T, T), boolean or
                additive, used as it is. None sees everything.
            token_type_ids: (B, T); ignored where type_vocab_size is 0.
            position_ids: (T,) or (B, T); by default 0..T-1, or as `position_numbering` says.
            output_hidden_states, output_attentions, return_dict: as everywhere in Transformers.
        Returns: last_hidden_state (B, T, H) and what was asked for.
        Raises:
            ValueError: not exactly one of input_ids and inputs_embeds; a shape other than these; more tokens than
                positions; on a CPU, an id beyond its table.
        """
        hidden = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds)
        if attention_mask is not None and attention_mask.dim() < 4:
            check_mask(attention_mask, *hidden.shape[:2])
            attention_mask = visible_keys(attention_mask)
        if attention_mask is not None and attention_mask.dim() == 3:
            attention_mask = attention_mask.unsqueeze(1)  # (B, T, T) -> (B, 1, T, T)
        keys_alone = attention_mask is None or attention_mask.dim() == 2  # as layers that are prepared take them
        if not (keys_alone and self.is_prepared and self.config._attn_implementation == "sdpa"):
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
        self.fastbert.embeddings.tied_by = self.mlm_head.tied_by = config
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
        **kwargs: Unpack[TransformersKwargs],
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
        if labels is not None:
            check_shape("labels", labels, hidden.shape[:2], meaning="(B, T)")
        targets = labels
        if labels is not None and self.training and self.config.sparse_prediction > 0:
            targets = labels.reshape(-1).to(hidden.device)
            selected = labelled_positions(targets, self.config.sparse_prediction)
            hidden, targets = hidden.flatten(0, 1)[selected], targets[selected]  # (B, T, H) -> (labelled, H)
        logits = self.mlm_head(hidden)
        loss = None
        if labels is not None:
            size = self.config.vocab_size
            loss = class_loss(
                lambda: self.loss_function(logits=logits, labels=targets, vocab_size=size, **kwargs),
                labels,
                size,
                "vocab_size",
            )
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
        **kwargs: Unpack[TransformersKwargs],
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
            config = self.config
            check_sequence_labels(labels, logits.shape[0], config.num_labels, config.problem_type)
            loss = class_loss(
                lambda: self.loss_function(labels=labels, pooled_logits=logits, config=config),
                labels,
                config.num_labels,
                "num_labels",
            )
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
        **kwargs: Unpack[TransformersKwargs],
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
            check_shape("labels", labels, logits.shape[:2], meaning="(B, T)")
            loss = class_loss(
                lambda: self.loss_function(logits, labels, self.config, **kwargs),
                labels,
                self.config.num_labels,
                "num_labels",
            )
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
        **kwargs: Unpack[TransformersKwargs],
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
            rows = start_logits.shape[0]
            check_shape("start_positions", start_positions, (rows,), (rows, 1), meaning="(B,) or (B, 1)")
            check_shape("end_positions", end_positions, (rows,), (rows, 1), meaning="(B,) or (B, 1)")
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
        **kwargs: Unpack[TransformersKwargs],
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
        loss = None
        if labels is not None:
            check_shape("labels", labels, logits.shape[:1], meaning="(B,)")
            cross_entropy = nn.functional.cross_entropy
            loss = class_loss(lambda: cross_entropy(logits, labels), labels, num_choices, "the number of choices")
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
