"""What the core does without is named with the extra that installs it."""

import configparser
import re
from pathlib import Path

import pytest

from fastbert_hf import extras
from fastbert_hf.extras import EXTRAS, MissingExtraError, require_extra

SETUP = Path(__file__).resolve().parent.parent / "setup.cfg"
MODULES = {
    "scikit-learn": "sklearn",
    "sentence-transformers": "sentence_transformers",
}  # where a distribution's module has another name


def test_the_table_is_that_of_setup_cfg():
    parser = configparser.ConfigParser()
    parser.read(SETUP)
    for extra, modules in EXTRAS.items():
        names = [re.match(r"[\w-]+", line)[0] for line in parser["options.extras_require"][extra].split("\n") if line]
        assert sorted(MODULES.get(name, name) for name in names) == sorted(modules)


def test_a_missing_module_names_its_extra(monkeypatch):
    require_extra("training")
    monkeypatch.setitem(EXTRAS, "training", ("json", "absent_one", "absent_two"))
    with pytest.raises(MissingExtraError, match=r"absent_one, absent_two are not installed.*fastbert-hf\[training\]"):
        require_extra("training")
    require_extra("training", "json")
    assert issubclass(extras.MissingExtraError, ImportError)
