"""Every command and snippet of the pages runs as it stands, in the page's order, on tiny models and little text."""

import configparser
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fastbert_hf.cli import benchmark
from tests.pages.lay import (
    Lay,
    checkout,
    copy_of,
    glue,
    pairs,
    published,
    short_hours,
    small_benchmark,
    table,
    texts,
)
from tests.pages.pages import NOT_RUN, ROOT, beginning, run, steps

ELSEWHERE = {"docs/hub.md": "tests/hub/test_hub_page.py", "docs/serve-http.md": "tests/clients/test_serve.py"}


@dataclass
class Page:
    """How a page is run.

    Attributes:
        lay: what lies at a path before the first step.
        run: how each command begins, and the options that make it small.
        leaves: what the page says there is in the end, beside the outputs that its commands name.
        patch: what else is made small.
    """

    lay: dict[str, Lay]
    run: dict[str, str] = field(default_factory=dict)
    leaves: tuple[str, ...] = ()
    patch: Callable[[pytest.MonkeyPatch], None] = lambda patch: None


DISTIL = "--fit_steps 1 --fff_depth 2 --fff_leaf_width 6 --batch_size 8 --disable_tqdm true"
PREPARE = "--validation_fraction 0.1"
PRETRAIN = "--per_device_train_batch_size 8 --use_cpu true --disable_tqdm true"
GLUE = "--max_steps 1 --max_seq_length 16 --use_cpu true --disable_tqdm true"
ONE_SEED = f"{GLUE} --seeds 0"  # where the recipe, not the page, names three

PAGES = {
    "README.md": Page(
        lay={
            "sentence-transformers/all-MiniLM-L6-v2": copy_of("embedder"),
            "pbelcak/UltraFastBERT-1x11-long": published,
            "text.txt": texts,
            "text.txt.xz": texts,
            "glue": glue,
            "scripts": checkout,
            "configs": checkout,
        },
        run={
            "fastbert distill": DISTIL,
            "fastbert quantize": "--rounds 1",
            "fastbert kernels": "",
            "python scripts/prepare_corpus.py": PREPARE,
            "python scripts/pretrain_mlm.py": PRETRAIN,
            "python scripts/run_glue.py": ONE_SEED,
            "python scripts/push_to_hub.py": "",
        },
        leaves=("runs/fast-minilm/distillation.md",),
        patch=short_hours,
    ),
    "docs/distil.md": Page(
        lay={
            "sentence-transformers/all-MiniLM-L6-v2": copy_of("embedder"),
            "original": copy_of("bert"),
            "text.txt": texts,
            "glue": glue,
        },
        run={"fastbert distill": DISTIL, "fastbert glue": ONE_SEED, "fastbert glue compare": ""},
        leaves=("runs/fast-minilm/fitted", "runs/fast-minilm/distillation.md"),
        patch=short_hours,
    ),
    "docs/train.md": Page(
        lay={"text.txt.xz": texts},
        run={"fastbert prepare": PREPARE, "fastbert pretrain": PRETRAIN, "fastbert compare": ""},
        leaves=("runs/pretrained/README.md", "runs/pretrained/tree_usage.png"),
        patch=short_hours,
    ),
    "docs/glue.md": Page(
        lay={
            "runs/pretrained": copy_of("pretrained"),
            "runs/a": copy_of("pretrained"),
            "runs/b": copy_of("pretrained"),
            "glue": glue,
        },
        run={"fastbert glue --config glue/small": ONE_SEED, "fastbert glue --config glue/paper": GLUE},
        leaves=("runs/glue/glue.md", "runs/glue/glue.csv", "runs/glue/glue.json"),
    ),
    "docs/glue-own-data.md": Page(
        lay={
            "runs/pretrained": copy_of("pretrained"),
            "train.csv": table,
            "validation.csv": table,
            "test.csv": table,
            "scripts": checkout,
            "configs": checkout,
        },
        run={"python scripts/run_glue.py": ONE_SEED},
        leaves=tuple(
            f"runs/own/pretrained/custom/seed-0/{name}"
            for name in ("settings.json", "summary.json", "predictions/test.tsv")
        ),
    ),
    "docs/serve.md": Page(
        lay={"runs/fast-minilm": copy_of("student"), "validation.jsonl": pairs},
        run={"fastbert kernels": "", "fastbert quantize": "--rounds 1"},
        leaves=("runs/fast-minilm-int8/prepared.json",),
    ),
    "docs/engines.md": Page(
        lay={
            "all-MiniLM-L6-v2": copy_of("embedder"),
            "runs/leaf-5x192-0": copy_of("student"),
            "stsb/validation.jsonl": pairs,
            "text.txt": texts,
        },
        run={"fastbert benchmark": "--quick --entries int8"},
        patch=small_benchmark,
    ),
    "docs/look.md": Page(lay={"runs/fast-minilm": copy_of("student"), "text.txt": texts}, run={"fastbert look": ""}),
    "docs/limits.md": Page(
        lay={"sentence-transformers/all-MiniLM-L6-v2": copy_of("bert")}, leaves=("minilm-fastbert/config.json",)
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_the_page_runs(name, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page, ran = PAGES[name], set()
    page.patch(monkeypatch)
    for path, lay in page.lay.items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        lay(made, Path(path))
    for step in steps(name):
        key = beginning(step, page.run)
        if step.language == "bash" and key is None:
            assert beginning(step, NOT_RUN), f"{step.text!r} is neither in PAGES nor in NOT_RUN"
        else:
            run(step, page.run.get(key, ""))
            ran.add(key)
    assert set(page.run) <= ran, "the page has no such command"
    assert [path for path in page.leaves if not Path(path).exists()] == []


def test_every_page_is_run():
    pages = ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
    assert {page for page in pages if steps(page)} == {*PAGES, *ELSEWHERE}
    for page, file in ELSEWHERE.items():
        assert f'steps("{page}")' in (ROOT / file).read_text(encoding="utf-8")
    for page in pages:
        fences = re.findall(r"^```(.*)$", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert set(fences[::2]) <= {"bash", "python"}, f"{page} has a block that nothing runs"


def test_commands_that_are_not_run_exist():
    listed = [step for page in [*PAGES, *ELSEWHERE] for step in steps(page) if beginning(step, NOT_RUN)]
    assert {beginning(step, NOT_RUN) for step in listed} == set(NOT_RUN), "no page has these commands"
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    for step in listed:
        match shlex.split(step.text):
            case ["make", target]:
                assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), step
            case ["pip", "install", package]:
                extras = re.fullmatch(r"\.(?:\[(.+)\])?", package)[1]
                assert set(extras.split(",") if extras else ()) <= set(setup["options.extras_require"]), step
            case ["python", "scripts/benchmark.py", *options]:
                benchmark.parse(options)
            case ["python", "examples/serve.py", _, *options]:
                known = (ROOT / "examples" / "serve.py").read_text(encoding="utf-8")
                assert all(f'"{option}"' in known for option in options if option.startswith("--")), step
            case other:
                raise AssertionError(f"nothing checks {other}")
