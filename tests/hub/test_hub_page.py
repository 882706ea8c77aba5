"""The commands of the page on the Hub, in their order, as they stand."""

import shlex
import subprocess
import sys

import pytest

from tests.clients.helpers import BLOCK_PACKAGE
from tests.hub.conftest import ROOT, hub_environment, published_files
from tests.hub.loopback import YOU
from tests.pages.pages import steps
from tests.processes import CHILD_SECONDS

SCRIPTS = {"pull": "pull_from_hub", "push": "push_to_hub"}  # they call what the commands call


@pytest.mark.slow
def test_the_commands_of_the_page_work_in_their_order(client, hub, tmp_path):
    hub.add("pbelcak/UltraFastBERT-1x11-long", published_files())
    printed = []
    client.python(f"import os; os.chdir({str(tmp_path)!r})")
    try:
        for step in steps("docs/hub.md"):
            program, name, *arguments = shlex.split(step.text)
            if (program, name) == ("python", "-c"):
                (code,) = arguments
                environment = hub_environment(hub.url, tmp_path / "home", YOU)
                command = [sys.executable, "-c", f"{BLOCK_PACKAGE}\n{code}"]
                subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=CHILD_SECONDS)
                continue
            assert program == "fastbert"
            answer = client.script(SCRIPTS[name], *arguments, token=YOU)
            assert answer.code == 0, answer.err
            printed.append(answer.out)
    finally:
        client.python(f"import os; os.chdir({str(ROOT)!r})")
    assert [any(text in out for out in printed) for text in ("would be sent", "split", "loaded back")] == [True] * 3
    assert hub.repositories["you/ultrafastbert"].private
    assert (tmp_path / "runs" / "ultrafastbert" / "model.safetensors").exists()
