"""Pretraining as processes of their own: killed at any moment, or two of them sharing the work."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastbert_hf.cli.pretrain import main
from tests.processes import CHILD_SECONDS
from tests.training.runs import losses

ROOT = Path(__file__).parents[3]
SCRIPT = str(ROOT / "scripts" / "pretrain_mlm.py")
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
STEPS = 60


def command(tiny, folder, microbatch, *extra):
    options = {
        "model_config": tiny / "model.yaml",
        "tokenizer_name": tiny / "tokenizer",
        "train_file": tiny / "corpus.txt",
        "validation_fraction": 0.1,
        "max_seq_length": 16,
        "output_dir": folder,
        "budget_tokens": STEPS * 8 * 16,
        "batch_size": 8,
        "batch_ramp": 0.5,
        "per_device_train_batch_size": microbatch,
        "learning_rate": 0.01,
        "disable_dropout": "false",
        "save_steps": 4,
        "save_total_limit": 2,
        "logging_steps": 1,
        "disable_tqdm": "true",
        "use_cpu": "true",
    }
    return [SCRIPT, *(f"--{name}={value}" for name, value in options.items()), *extra]


def pretrain_here(data, folder, *extra):
    """The same command in this process, which has imported everything already."""
    main(command(data, folder, 4, *extra)[1:])


def finish(arguments, **options):
    done = subprocess.run(
        arguments, env=ENVIRONMENT, capture_output=True, text=True, timeout=CHILD_SECONDS, **options
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def uninterrupted(tiny, tmp_path_factory):
    """Folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    pretrain_here(tiny, folder)
    return folder


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_like_one_that_was_not(tiny, uninterrupted, tmp_path):
    out = tmp_path / "out"
    kills = 0
    for wanted in (8, 24):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen([sys.executable, *command(tiny, out, 4)], env=ENVIRONMENT, **quiet)
        try:
            deadline = time.monotonic() + CHILD_SECONDS
            while process.poll() is None and not any(
                int(path.name[11:]) >= wanted for path in out.glob("checkpoint-*")
            ):
                assert time.monotonic() < deadline
                time.sleep(0.002)  # whatever it is doing then, perhaps writing the next checkpoint
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += process.wait(timeout=CHILD_SECONDS) == -signal.SIGKILL
        finally:
            process.kill()
            process.wait()
        assert not (out / "summary.json").exists()
    assert kills == 2
    finish([sys.executable, *command(tiny, out, 4)])
    summary, expected = (json.loads((folder / "summary.json").read_text()) for folder in (out, uninterrupted))
    assert summary["resumed_from"] is not None and summary["steps"] == expected["steps"]
    assert losses(out) == losses(uninterrupted)
    assert summary["validation_loss"] == expected["validation_loss"]
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="this torch has no gloo"
)
def test_two_processes_have_the_losses_of_one(tiny, uninterrupted, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    # The clock of the first process decides when to save: both must save at the same step.
    finish([*launch, *command(tiny, tmp_path / "out", 4, "--save_minutes=0.01")])
    two, one = losses(tmp_path / "out"), losses(uninterrupted)
    # Each process takes at least one microbatch: the ramp begins with two instead of one.
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["tokens_seen"] >= STEPS * 8 * 16 and (tmp_path / "out" / "tree_usage.png").is_file()
    assert len(two) < len(one)
    pretrain_here(tiny, tmp_path / "one", "--batch_ramp=0.0")
    finish([*launch, *command(tiny, tmp_path / "two", 4, "--batch_ramp=0.0")])
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == STEPS
    assert two == one  # two microbatches a step, in one process or two: the sum of two gradients has no order
