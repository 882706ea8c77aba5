"""For every test: no network, one thread, caches and temporary files of this process alone."""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, too

OWN = tempfile.mkdtemp(prefix="fastbert-tests-")  # several workers, or runs, do not see each other's files
atexit.register(shutil.rmtree, OWN, ignore_errors=True)
for variable, name in (("HF_HOME", "hf"), ("TMPDIR", "tmp")):
    os.environ[variable] = os.path.join(OWN, name)
    os.mkdir(os.environ[variable])

import pytest  # noqa: E402
import torch  # noqa: E402

LONGEST_FIRST = (  # files that would keep one worker busy after all others, were they last
    "tests/kernels/test_triton.py",
    "tests/training/pretraining/test_processes.py",
    "tests/pages/test_pages.py",
    "tests/kernels/test_native_sanitize.py",
    "tests/clients/test_compile.py",
    "tests/scripts/test_scripts.py",
    "tests/training/test_leaf_balance.py",
    "tests/hub/test_without_package.py",
    "tests/training/glue/test_clients.py",
)


def pytest_collection_modifyitems(items):
    """With several workers, each takes the next file in this order."""
    place = {name: index for index, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0], len(place)))


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny models gain nothing from threads, and lose much where other processes hold the cores.

    Numbers next to zero stay what they are: libraries that were loaded before may have had the processor flush them.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(False)
    yield
    torch.set_num_threads(threads)
