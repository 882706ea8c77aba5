"""Students: a teacher with other feed-forward layers, or with fewer layers; its other weights are taken over."""

import copy
import re
from dataclasses import dataclass

from fastbert_hf.configuration_fastbert import FastBertConfig
from fastbert_hf.modeling_fastbert import FastBertModel, FastBertPreTrainedModel
from fastbert_hf.training.distillation.layer_fit import check_form

LAYERS = r"layers:(\d+)"


@dataclass(frozen=True)
class Student:
    """A model that learns from a teacher.

    Attributes:
        model: in training precision, on the CPU.
        teacher_layers: for each of its layers, the layer of the teacher that it follows.
    """

    model: FastBertPreTrainedModel
    teacher_layers: list[int]

    @property
    def encoder(self) -> FastBertModel:
        """The model without its head."""
        return encoder_of(self.model)


def encoder_of(model: FastBertPreTrainedModel) -> FastBertModel:
    """The encoder of a model with a head; the model itself where it has none."""
    return getattr(model, "fastbert", model)


def check_student_form(form: str) -> None:
    """Raise ValueError unless `student_of` knows the form."""
    match = re.fullmatch(LAYERS, form)
    if match is None:
        if form.startswith("flat:"):
            raise ValueError(f"a model has no layers of the form {form!r}; it is a control of fit-layers alone")
        check_form(form)


def form_fields(form: str) -> dict[str, object]:
    """The fields of FastBertConfig that a form of feed-forward layer stands for."""
    kind, _, sizes = form.partition(":")
    numbers = [int(size) for size in sizes.split("x")]
    if kind == "dense":
        return {"ffn_type": "dense", "intermediate_size": numbers[0], "dense_gated": False}
    if kind == "tree":
        trees, depth, width = (*numbers, None)
    else:
        trees, depth, width = numbers if len(numbers) == 3 else (1, *numbers)
    return {
        "ffn_type": "fff", "fff_trees": trees, "fff_depth": depth, "fff_leaf_width": width, "fff_bias": True,
    }  # fmt: skip


def form_of(fff_trees: int, fff_depth: int, fff_leaf_width: int) -> str:
    """The form of leaf trees of these sizes."""
    return f"leaf:{fff_trees}x{fff_depth}x{fff_leaf_width}"


# Students learn without dropout, and cannot bear it afterwards: 0.1 of it takes the hidden-state error of leaf trees
# from 0.28 to 0.69, and that of their teacher from 0 to 0.24 (docs/log.md). So they have none in fine-tuning.
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "embedding_dropout_prob": None}


def student_of(teacher: FastBertPreTrainedModel, form: str) -> Student:
    """A student with the teacher's weights wherever both have the same part, and without dropout.

    Args:
        teacher: dense.
        form: "leaf:DxW", "leaf:PxDxW", "tree:PxD" or "dense:F", whose feed-forward layers begin at random; or
            "layers:N": N of the teacher's layers, evenly spaced, the last one among them.

    Raises:
        ValueError: an unknown form; more layers than the teacher has; dense layers for a teacher without biases.
    """
    check_student_form(form)
    config: FastBertConfig = copy.deepcopy(teacher.config)
    for name, value in NO_DROPOUT.items():
        setattr(config, name, value)
    count = config.num_hidden_layers
    kept = list(range(count))
    match = re.fullmatch(LAYERS, form)
    if match is None:
        if form.startswith("dense:") and not config.use_bias:
            raise ValueError(f"{form!r} has biases and the model has none (use_bias is False); expected trees")
        for name, value in form_fields(form).items():
            setattr(config, name, value)
    else:
        config.num_hidden_layers = int(match.group(1))
        if not 1 <= config.num_hidden_layers <= count:
            raise ValueError(f"{form!r} asks for {match.group(1)} layers; expected 1 to {count}")
        kept = [round((i + 1) * count / config.num_hidden_layers) - 1 for i in range(config.num_hidden_layers)]
    model = type(teacher)(config)
    weights = {}
    for name, value in teacher.state_dict().items():
        layer = re.fullmatch(r"(.*\blayers\.)(\d+)(\..+)", name)
        if layer is None:
            weights[name] = value
        elif match is not None or not layer[3].startswith(".ffn."):
            numbers = [number for number, source in enumerate(kept) if source == int(layer[2])]
            weights |= {f"{layer[1]}{number}{layer[3]}": value for number in numbers}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    wrong = [name for name in missing if ".ffn." not in name] + unexpected
    if wrong:
        raise AssertionError(f"the student does not fit its teacher: {', '.join(wrong)}")
    return Student(model.eval(), kept)
