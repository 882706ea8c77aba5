"""What runs an encoder: PyTorch in several forms, ONNX Runtime, OpenVINO, and FastBERT prepared for inference.

An engine loads a model folder for a number of threads. Packages that are missing, and models that an engine cannot
run, raise `Unavailable` with the reason. Files that an engine makes of a model lie in a cache folder.
"""

import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.utils import logging

import fastbert_hf
from fastbert_hf.benchmarks.models import NoFeedForward, with_feed_forward

Call = Callable[[], Any]  # one forward pass on inputs that were bound to it
CALIBRATION_TEXTS = 128  # what optimum-intel calibrates OpenVINO with
CALIBRATION_TOKENS = 384  # which sentence-transformers pads each of them to


class Unavailable(Exception):
    """An engine cannot run a model here; the message is the reason."""


@dataclass(frozen=True)
class Job:
    """What an engine loads.

    Attributes:
        folder: of the model. cache: where files that are made of it are kept.
        threads: for one forward pass. dtype: "float32", "bfloat16" or "int8".
        no_feed_forward: leave the feed-forward layers out.
        calibration: (ids, mask) of shape (1, T), for engines that calibrate.
    """

    folder: Path
    cache: Path
    threads: int
    dtype: str
    no_feed_forward: bool = False
    calibration: list[tuple[Tensor, Tensor]] = field(default_factory=list)


@dataclass(frozen=True)
class Loaded:
    """A model that is ready.

    Attributes:
        bind: from (ids, mask) to a call on them. last_hidden: from what the call returns to (B, T, H) float32.
    """

    bind: Callable[[Tensor, Tensor], Call]
    last_hidden: Callable[[Any], Tensor]


def needs(module: str) -> Any:
    """Import a module.

    Raises:
        Unavailable: it is not installed, or fails to load.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(str(error)) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Exporters warn of what tracing does to every model, loaders of a pooler that nobody uses here."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)


def original(job: Job, attention: str = "sdpa") -> nn.Module:
    """The encoder as Transformers runs it, without a pooler, whose output nobody uses here."""
    with quiet():
        model = AutoModel.from_pretrained(job.folder, dtype=torch.float32, attn_implementation=attention)
    if hasattr(model, "pooler"):
        model.pooler = None
    return model.eval()


def fastbert(job: Job, prepare: Callable[[nn.Module], nn.Module] = lambda model: model) -> nn.Module:
    """The folder as a FastBERT, loaded in float32 and prepared, feed-forward layers taken out last."""
    model = prepare(fastbert_hf.FastBertModel.from_pretrained(job.folder, dtype=torch.float32).eval())
    return with_feed_forward(model, lambda ffn: NoFeedForward()) if job.no_feed_forward else model


def as_loaded(model: Callable) -> Loaded:
    """A model that is called as those of Transformers are."""

    def bind(ids: Tensor, mask: Tensor) -> Call:
        return lambda: model(input_ids=ids, attention_mask=mask)

    return Loaded(bind, lambda output: output.last_hidden_state.float())


def torch_eager(job: Job) -> Loaded:
    """Transformers, in float32 or bfloat16."""
    return as_loaded(original(job).to(getattr(torch, job.dtype)))


def torch_compile(job: Job) -> Loaded:
    """torch.compile for the shapes of every case, with frozen weights, so that inductor packs and fuses them."""
    torch._inductor.config.freezing = True
    return as_loaded(torch.compile(original(job).to(getattr(torch, job.dtype)), dynamic=False))


def torch_int8(job: Job) -> Loaded:
    """torch's own dynamic quantisation of linear layers: int8 weights, activations quantised in every call."""
    with quiet():
        return as_loaded(torch.ao.quantization.quantize_dynamic(original(job), {nn.Linear}, dtype=torch.qint8))


def fastbert_plain(job: Job) -> Loaded:
    """FastBERT as `from_pretrained` loads it, float32."""
    return as_loaded(fastbert(job))


def fastbert_prepared(job: Job) -> Loaded:
    """FastBERT after `prepare_for_inference`."""
    prepare = getattr(fastbert_hf, "prepare_for_inference", None)
    if prepare is None:
        raise Unavailable("this version of fastbert_hf has no prepare_for_inference")
    return as_loaded(fastbert(job, lambda model: prepare(model, dtype=job.dtype)))


class OutputOnly(nn.Module):
    """The last hidden states as the only output, from positional inputs: what exporters take."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


NAMES = ("input_ids", "attention_mask")


def _example() -> tuple[Tensor, Tensor]:
    """Two texts of different lengths: an exporter that sees padding keeps the mask."""
    mask = torch.ones(2, 16, dtype=torch.int64)
    mask[1, 9:] = 0
    return torch.full_like(mask, 5), mask


def onnx_file(job: Job) -> Path:
    """The model as ONNX, float32, any batch and length, exported once.

    The exporter is that of optimum, by tracing: its graphs are those that ONNX Runtime knows how to fuse.
    """
    path = job.cache / "model.onnx"
    if not path.exists():
        needs("onnx")
        axes = {0: "batch", 1: "tokens"}
        with torch.no_grad(), quiet():
            torch.onnx.export(
                OutputOnly(original(job, attention="eager")),
                _example(),
                str(path),
                dynamo=False,
                input_names=list(NAMES),
                output_names=["last_hidden_state"],
                dynamic_axes={name: axes for name in (*NAMES, "last_hidden_state")},
                opset_version=17,
            )
    return path


def onnx_fused_file(job: Job) -> Path:
    """The same with attention, layer norms and embeddings as ONNX Runtime's own operators, made once."""
    path = job.cache / "model-fused.onnx"
    if not path.exists():
        optimizer = needs("onnxruntime.transformers.optimizer")
        config = AutoConfig.from_pretrained(job.folder)
        fused = optimizer.optimize_model(
            str(onnx_file(job)),
            model_type="bert",
            num_heads=config.num_attention_heads,
            hidden_size=config.hidden_size,
            opt_level=0,
        )
        if not fused.get_fused_operator_statistics()["Attention"]:
            raise Unavailable("ONNX Runtime's optimizer found no attention in the exported graph")
        fused.save_model_to_file(str(path))
    return path


def onnx_int8_file(source: Path) -> Path:
    """An ONNX file with dynamic int8 products, made once.

    The settings are those that optimum calls avx512_vnni: symmetric int8 weights with a scale a column, uint8
    activations, of everything that ONNX Runtime quantises dynamically: all matrix products, those of two activations
    included, fused attention, and embedding tables.
    """
    path = source.with_name(f"{source.stem}-int8.onnx")
    if not path.exists():
        onnx, quantization = needs("onnx"), needs("onnxruntime.quantization")
        quantization.quantize_dynamic(
            str(source),
            str(path),
            per_channel=True,
            weight_type=quantization.QuantType.QInt8,
            extra_options={
                "MatMulConstBOnly": False,
                "DefaultTensorType": onnx.TensorProto.FLOAT,  # of what fused operators give
            },
        )
    return path


def onnx_session(path: Path, threads: int) -> Loaded:
    """A file in ONNX Runtime."""
    onnxruntime = needs("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def bind(ids: Tensor, mask: Tensor) -> Call:
        feed = dict(zip(NAMES, (ids.numpy(), mask.numpy())))
        return lambda: session.run(None, feed)

    return Loaded(bind, lambda output: torch.from_numpy(output[0]))


def onnx_plain(job: Job) -> Loaded:
    """ONNX Runtime on the exported graph, float32 or dynamic int8, as sentence-transformers runs it."""
    path = onnx_file(job)
    return onnx_session(onnx_int8_file(path) if job.dtype == "int8" else path, job.threads)


def onnx_fused(job: Job) -> Loaded:
    """ONNX Runtime on the graph that its optimizer for BERTs made, float32 or dynamic int8."""
    path = onnx_fused_file(job)
    return onnx_session(onnx_int8_file(path) if job.dtype == "int8" else path, job.threads)


def openvino_file(job: Job) -> Path:
    """The model as OpenVINO's IR, float32, any batch and length, converted once."""
    path = job.cache / "openvino.xml"
    if not path.exists():
        openvino = needs("openvino")
        with torch.no_grad(), quiet():
            model = openvino.convert_model(OutputOnly(original(job)), example_input=dict(zip(NAMES, _example())))
        openvino.save_model(model, str(path), compress_to_fp16=False)
    return path


def openvino_int8_file(job: Job) -> Path:
    """The same quantised to int8, weights and activations calibrated as optimum-intel does by default, made once."""
    path = job.cache / "openvino-int8.xml"
    if not path.exists():
        openvino, nncf = needs("openvino"), needs("nncf")
        data = [dict(zip(NAMES, (ids.numpy(), mask.numpy()))) for ids, mask in job.calibration]
        model = nncf.quantize(
            openvino.Core().read_model(str(openvino_file(job))),
            nncf.Dataset(data),
            subset_size=len(data),
            model_type=nncf.ModelType.TRANSFORMER,
            advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.DISABLE),
        )
        openvino.save_model(model, str(path), compress_to_fp16=False)
    return path


def openvino(job: Job) -> Loaded:
    """OpenVINO for the least latency. What is not int8 in an int8 model runs in the dtype that it takes by itself."""
    runtime = needs("openvino")
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": job.threads,
        "ENABLE_CPU_PINNING": False,  # several processes would be pinned to the same core
    }
    if job.dtype == "int8":
        path = openvino_int8_file(job)
    else:
        path = openvino_file(job)
        settings["INFERENCE_PRECISION_HINT"] = {"float32": "f32", "bfloat16": "bf16"}[job.dtype]
    request = runtime.Core().compile_model(str(path), "CPU", settings).create_infer_request()

    def bind(ids: Tensor, mask: Tensor) -> Call:
        feed = dict(zip(NAMES, (ids.numpy(), mask.numpy())))
        return lambda: request.infer(feed)[0]

    return Loaded(bind, lambda output: torch.from_numpy(output).float())


ENGINES: dict[str, Callable[[Job], Loaded]] = {
    "torch": torch_eager,
    "torch.compile": torch_compile,
    "torch dynamic int8": torch_int8,
    "ONNX Runtime": onnx_plain,
    "ONNX Runtime, fused": onnx_fused,
    "OpenVINO": openvino,
    "FastBERT": fastbert_plain,
    "FastBERT, prepared": fastbert_prepared,
}
