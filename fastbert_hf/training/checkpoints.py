"""Checkpoints that are whole or not there: found, checked, written beside their place and then renamed."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from fastbert_hf.files import check_output_folder
from fastbert_hf.hub.weights import check_weights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, TrainingArguments

FRESH = ("none", "false", "no")
STATE = "trainer_state.json"
STAGE = ".checkpoint-being-written"


def find_checkpoint(args: "TrainingArguments", overwrite: bool = False) -> str | None:
    """Decide what a run starts from; nothing is changed.

    Args:
        args: `resume_from_checkpoint` is a folder, empty or "true" (the last complete checkpoint in `output_dir`,
            if there is one) or "none" (start anew beside what is there).
        overwrite: start anew, whatever is in `output_dir`.

    Returns:
        A checkpoint folder, or None for a fresh start.

    Raises:
        ValueError: if `output_dir` is a file, or the named checkpoint does not exist or is incomplete.
    """
    output_dir = check_output_folder(args.output_dir)
    wanted = args.resume_from_checkpoint
    if wanted and wanted.lower() not in (*FRESH, "true"):
        if not (Path(wanted) / STATE).is_file():
            raise ValueError(f"resume_from_checkpoint {wanted!r} holds no {STATE}: not a whole checkpoint")
        return wanted
    if overwrite or (wanted and wanted.lower() in FRESH):
        return None
    return last_checkpoint(output_dir)


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The complete checkpoint of most steps in a run's folder, or None."""
    # The Trainer writes its state last: a folder without it was interrupted while being written.
    complete = [path.parent for path in Path(output_dir).glob(f"checkpoint-*/{STATE}")]
    return str(max(complete, key=_steps)) if complete else None


def _steps(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


def check_checkpoint(checkpoint: str | None, config: "PreTrainedConfig") -> None:
    """Check that a checkpoint holds the model that is about to be trained.

    Args:
        checkpoint: what `find_checkpoint` returned.
        config: the model's configuration.

    Raises:
        ValueError: naming the first field that differs, or a damaged weight file.
    """
    check_weights(checkpoint)
    file = Path(checkpoint or "") / "config.json"
    if checkpoint is None or not file.is_file():
        return
    stored = json.loads(file.read_text(encoding="utf-8"))
    current = json.loads(config.to_json_string(use_diff=False))
    bookkeeping = {"transformers_version", "architectures", "dtype", "_name_or_path", "auto_map", "use_cache"}
    for name in sorted(stored.keys() & current.keys() - bookkeeping):
        if stored[name] != current[name] and not name.endswith("_token_id"):
            raise ValueError(
                f"{checkpoint!r} was made by another run: {name} is {stored[name]!r} there, {current[name]!r} here; "
                "choose another output_dir, or --overwrite_output_dir to remove its checkpoints"
            )


def remove_checkpoints(output_dir: str | Path) -> None:
    """Remove the checkpoints of an earlier run.

    Args:
        output_dir: the run's folder; everything else in it stays.
    """
    for checkpoint in Path(output_dir).glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def remove_unfinished(output_dir: str | Path) -> None:
    """Remove what an interrupted run was writing when it stopped."""
    shutil.rmtree(Path(output_dir) / STAGE, ignore_errors=True)


@contextlib.contextmanager
def staged_checkpoint(output_dir: str | Path, name: str, keep: int | None, main: bool, barrier) -> Iterator[Path]:
    """Give a folder to write a checkpoint into, and rename what was written when it is whole.

    Args:
        output_dir: the run's folder.
        name: "checkpoint-N".
        keep: older checkpoints are removed down to this number once the new one is in place; None keeps all.
        main: whether this process renames and removes.
        barrier: waits for all processes.

    Yields:
        The folder inside which `name` is to be written.

    Raises:
        ValueError: it could not be written; older checkpoints are untouched.
    """
    output_dir, stage = Path(output_dir), Path(output_dir) / STAGE
    try:
        if main:
            shutil.rmtree(stage, ignore_errors=True)
        barrier()
        yield stage
        barrier()
        if main:
            _sync(stage / name)
            if (output_dir / name).exists():
                shutil.rmtree(output_dir / name)
            os.replace(stage / name, output_dir / name)
            shutil.rmtree(stage, ignore_errors=True)
            _remove_old(output_dir, keep)
        barrier()
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save says RuntimeError for a full disk
        shutil.rmtree(stage, ignore_errors=True)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{name} could not be written in {str(output_dir)!r}: {reason}; "
            f"the last good checkpoint is {last_checkpoint(output_dir) or 'none'}"
        ) from error


def _sync(folder: Path) -> None:
    """Have the disk hold a folder's files before it gets the name that makes it count."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove_old(output_dir: Path, keep: int | None) -> None:
    checkpoints = sorted(
        (path for path in output_dir.glob("checkpoint-*") if path.name.rsplit("-", 1)[1].isdigit()), key=_steps
    )
    for checkpoint in checkpoints[: -max(keep, 1)] if keep else ():
        shutil.rmtree(checkpoint, ignore_errors=True)
