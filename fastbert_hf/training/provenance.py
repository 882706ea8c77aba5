"""What a run was made with, kept in its checkpoints, so that another run in the same folder is noticed.

Every setting counts, except those that cannot change a weight. A list of those that can would miss the next option of
the library.
"""

import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastbert_hf.files import file_digest, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, TrainingArguments

logger = logging.getLogger(__name__)

PROVENANCE = "run_settings.json"
WITHOUT_EFFECT = frozenset({
    # paths, what is shown and logged, what is uploaded
    "output_dir", "resume_from_checkpoint", "logging_strategy", "logging_steps", "logging_first_step",
    "log_on_each_node", "logging_nan_inf_filter", "include_num_input_tokens_seen", "log_level",
    "log_level_replica", "disable_tqdm", "report_to", "run_name", "project", "trackio_space_id",
    "trackio_bucket_id", "trackio_static_space_id", "debug", "skip_memory_metrics", "push_to_hub", "hub_token",
    "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision",
    # how checkpoints are kept, how held-out data is run through the model
    "save_only_model", "save_on_each_node", "save_total_limit", "enable_jit_checkpoint",
    "per_device_eval_batch_size", "eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object",
    "include_for_metrics", "batch_eval_metrics",
    # the machine: processes, memory, transport
    "local_rank", "use_cpu", "ddp_backend", "ddp_timeout", "ddp_bucket_cap_mb", "ddp_find_unused_parameters",
    "ddp_static_graph", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers",
    "dataloader_prefetch_factor", "dataloader_multiprocessing_context", "torch_empty_cache_steps",
    # which steps follow training
    "do_eval", "do_predict",
})  # fmt: skip


@dataclass
class Provenance:
    """What a run was made with.

    Attributes:
        settings: everything that decides its weights and stays the same while it is interrupted and goes on.
        parts: what may change between its parts, such as the budget: [{"from_step": 0, ...}, ...].
    """

    settings: dict[str, Any]
    parts: list[dict[str, Any]] = field(default_factory=list)

    def write(self, folder: str | Path) -> None:
        """Keep it in a checkpoint."""
        write_text(Path(folder) / PROVENANCE, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, folder: str | Path) -> "Provenance | None":
        """What a checkpoint was made with; None, and a warning, for one that does not say.

        Raises:
            ValueError: the file is damaged.
        """
        file = Path(folder) / PROVENANCE
        if not file.is_file():
            logger.warning("%s does not say which settings it was made with: they are not compared", folder)
            return None
        try:
            return cls(**json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{str(file)!r} cannot be read: {error}") from error

    def begin_part(self, **part: Any) -> None:
        """Add a part, unless the last one is equal apart from its first step.

        Args:
            **part: `from_step`, and what the part is made with.
        """
        last = self.parts[-1] if self.parts else {}
        if {**last, "from_step": 0} != {**part, "from_step": 0}:
            self.parts.append(part)


def training_settings(args: "TrainingArguments", without: Iterable[str] = ()) -> dict[str, Any]:
    """The training arguments that decide weights.

    Args:
        args: as they were given.
        without: further names that do not count in this kind of run.

    Returns:
        Name -> value as JSON holds it.
    """
    left_out = WITHOUT_EFFECT.union(without)
    return as_json({name: value for name, value in args.to_dict().items() if name not in left_out})


def as_json(values: dict[str, Any]) -> dict[str, Any]:
    """Values as they are read from a JSON file again."""
    return json.loads(json.dumps(values, default=str))


def check_same_settings(stored: dict[str, Any], here: dict[str, Any], where: str) -> None:
    """Check that a run goes on with the settings it was begun with.

    Args:
        stored: settings of the run that is there.
        here: settings of the run that is wanted; names that only one of both has (other versions) are not compared.
        where: the checkpoint or folder.

    Raises:
        ValueError: naming the first setting that differs, and both values.
    """
    for name in sorted(stored.keys() & here.keys()):
        if stored[name] != here[name]:
            raise ValueError(
                f"{where!r} was made by another run: {name} is {stored[name]!r} there, {here[name]!r} here; choose "
                "another output_dir, --overwrite_output_dir to remove its checkpoints, or --model_name_or_path to "
                "begin a new run from its weights"
            )


def weights_identity(name_or_path: str, config: "PreTrainedConfig") -> str:
    """What identifies the weights a run begins with: the digest of a folder's files, or a name and commit of the Hub.

    Args:
        name_or_path: model folder or Hub name.
        config: loaded from there.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        return f"{name_or_path} at {getattr(config, '_commit_hash', None)}"
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin")):
        digest.update(bytes.fromhex(file_digest(file)))
    return digest.hexdigest()
