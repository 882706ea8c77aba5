"""What every model that learns from another shares, pretrained or distilled."""

from torch import Tensor, nn

from fastbert_hf.encoder_fastbert import FastBertAttention


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the student's from the teacher's distribution, in nats: logits (N, C) -> ().

    Zero where N is 0.
    """
    own, wanted = student.log_softmax(-1), teacher.log_softmax(-1)
    return nn.functional.kl_div(own, wanted, log_target=True, reduction="sum") / max(1, len(own))


def without_dropout(model: nn.Module) -> nn.Module:
    """The model with all dropout switched off; its configuration keeps the values."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, FastBertAttention):
            module.dropout = 0.0
    return model
