"""Builds the native CPU kernels and takes the recipes along; everything else is in setup.cfg.

The kernels are optional: without a C++ compiler the package installs without them, says so here, and
`python -m fastbert_hf.kernels` repeats why.
"""

import configparser
import importlib.util
import re
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NATIVE = Path("fastbert_hf/kernels/native")
SOURCES = sorted(str(path) for path in (NATIVE / "csrc").iterdir())


def load_build_module():
    """native/build.py by itself: importing the package would need torch."""
    spec = importlib.util.spec_from_file_location("fastbert_native_build", NATIVE / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class build_native(build_ext):
    """A library with C functions, not a Python module, so it keeps its own name and its own build."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, extension: Extension) -> None:
        folder = Path(self.get_ext_fullpath(extension.name)).parent
        reason = load_build_module().build_or_explain(folder)
        if reason is not None:
            self.announce(
                f"fastbert-hf: WITHOUT native CPU kernels, the plain PyTorch backend is used instead. {reason}", 4
            )

    def copy_extensions_to_source(self) -> None:
        for extension in self.extensions:
            load_build_module().build_or_explain(Path(*extension.name.split(".")).parent)


class bdist_kernels(bdist_wheel):
    """One wheel for every Python of a platform, as ctypes loads the library; for any platform without the library."""

    def get_tag(self) -> tuple[str, str, str]:
        *_, platform = super().get_tag()
        built = any(Path(self.bdist_dir).rglob(load_build_module().LIBRARY_NAME))
        return "py3", "none", platform if built else "any"


def long_description() -> str:
    """README.md, whose links to files work elsewhere: they lead into the repository that setup.cfg names, if any."""
    setup_cfg = configparser.ConfigParser()
    setup_cfg.read("setup.cfg", encoding="utf-8")
    urls = dict(line.split(" = ", 1) for line in setup_cfg["metadata"].get("project_urls", "").split("\n") if line)
    link = rf"[\1]({urls['Repository']}/blob/main/\2)" if "Repository" in urls else r"\1"
    return re.sub(r"\[([^\]]*)\]\((?!https?://|#)([^)]*)\)", link, Path("README.md").read_text(encoding="utf-8"))


setup(
    long_description=long_description(),
    ext_modules=[Extension("fastbert_hf.kernels.native.libfff", sources=SOURCES, optional=True)],
    # the recipes of configs/ are part of the package; a checkout, also an editable one, has them beside it
    packages=[*find_packages(include=["fastbert_hf*"]), "fastbert_hf.configs"],
    package_dir={"fastbert_hf.configs": "configs"},
    package_data={
        "fastbert_hf": ["py.typed"],
        "fastbert_hf.configs": ["*/*.yaml"],
        "fastbert_hf.benchmarks": ["*.cpp"],
        "fastbert_hf.hub": ["model_card.md"],
        "fastbert_hf.look": ["page.*"],
        "fastbert_hf.kernels.native": ["csrc/*", "build_failure.txt"],
    },
    cmdclass={"build_ext": build_native, "bdist_wheel": bdist_kernels},
)
