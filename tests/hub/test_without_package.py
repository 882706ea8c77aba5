"""A stranger: a process that does not have the package, and the repository is all it gets."""

import json
import subprocess
import sys

import pytest
import torch

from fastbert_hf import FastBertForMaskedLM, use_backend
from tests.clients.helpers import BLOCK_PACKAGE, random_batch, tiny_model
from tests.clients.test_hub_code import AUTO_MAP
from tests.hub.conftest import folder_files, hub_environment, published_files
from tests.hub.loopback import OWNER
from tests.processes import CHILD_SECONDS

ONLINE = """
import torch, transformers
repo, published = sys.argv[1:]
for name, message in ((repo, "trust_remote_code"), (published, "crammedBERT")):
    try:
        transformers.AutoModelForMaskedLM.from_pretrained(name)
    except ValueError as error:
        assert message in str(error), error
    else:
        raise SystemExit(f"{name} loaded")
assert not any("transformers_modules." in name for name in sys.modules)  # nothing of it has run

saved = torch.load("saved.pt")
transformers.AutoTokenizer.from_pretrained(repo)
for revision in ("main", "v1"):
    model = transformers.AutoModelForMaskedLM.from_pretrained(repo, revision=revision, trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(model(**saved["inputs"]).logits, saved[revision]), revision
model.save_pretrained("derived")
print("online")
"""

OFFLINE = """
import torch, transformers
transformers.AutoTokenizer.from_pretrained(sys.argv[1])
model = transformers.AutoModelForMaskedLM.from_pretrained(sys.argv[1], trust_remote_code=True)
saved = torch.load("saved.pt")
with torch.no_grad():
    assert torch.equal(model(**saved["inputs"]).logits, saved["main"])
print("offline")
"""


def run(script, *arguments, cwd, url, **environment):
    """A process of its own, without the package."""
    result = subprocess.run(
        [sys.executable, "-c", BLOCK_PACKAGE + script, *arguments],
        cwd=cwd,
        env=hub_environment(url, cwd / "home", **environment),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=CHILD_SECONDS,
    )
    assert result.returncode == 0, result.stderr[-5000:]
    assert OWNER not in result.stdout + result.stderr
    return result.stdout.split()[-1]


def logits(model, inputs):
    with torch.no_grad(), use_backend("reference"):  # the backend that travels
        return model(**inputs).logits


@pytest.mark.slow
def test_a_stranger_uses_old_and_new_revisions_and_then_only_the_cache(client, hub, repo, folder, tmp_path):
    inputs = random_batch(4, 9)
    saved = {"inputs": inputs, "v1": logits(tiny_model(FastBertForMaskedLM), inputs)}
    assert client.script("push_to_hub", folder, repo, "--private").code == 0
    hub.repositories[repo].tags["v1"] = hub.repositories[repo].branches["main"]
    new = tiny_model(FastBertForMaskedLM, seed=1)
    new.save_pretrained(folder)
    assert client.script("push_to_hub", folder, repo).code == 0
    saved["main"] = logits(new, inputs)
    torch.save(saved, tmp_path / "saved.pt")
    hub.add("pbelcak/UltraFastBERT-1x11-long", published_files())

    assert run(ONLINE, repo, "pbelcak/UltraFastBERT-1x11-long", cwd=tmp_path, url=hub.url, token=OWNER) == "online"
    derived = folder_files(tmp_path / "derived")
    assert json.loads(derived["config.json"])["auto_map"] == AUTO_MAP  # its own code, not the first repository's
    assert {name for name in derived if name.endswith(".py")} == {
        n for n in folder_files(folder) if n.endswith(".py")
    }

    client.python(f"import transformers; transformers.AutoTokenizer.from_pretrained({repo!r})")
    online = f"import transformers; transformers.AutoTokenizer.from_pretrained({repo!r})"
    run(f"{online}\nprint('ok')", cwd=tmp_path, url=hub.url, token=OWNER)
    hub.stop()
    assert run(OFFLINE, repo, cwd=tmp_path, url=hub.url, HF_HUB_OFFLINE="1") == "offline"
