"""The structure of the repository: imports point downwards, bundle files are self-contained, files stay small."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fastbert_hf"
# each level may import from itself and from those before it
LEVELS = [
    (
        "fff_reference",
        "leaf_reference",
        "leaf_traceable",
        "quantized_weights",
        "quantized_reference",
        "encoder_reference",
        "kernels",
    ),
    ("backends_fastbert", "dispatch_fastbert"),
    ("fff_op", "leaf_op", "quantized_op", "encoder_op"),
    ("fff_layer", "leaf_layer", "quantized_layer", "quantized_linear"),
    ("configuration_fastbert", "inputs_fastbert"),
    ("encoder_fastbert",),
    ("inference_fastbert",),
    ("quantizer_fastbert",),
    ("heads_fastbert",),
    ("checkpoint_fastbert",),
    ("pretrained_fastbert",),
    ("modeling_fastbert",),
    ("published_layout",),
    ("bert_layouts",),
    ("__init__",),
    ("files", "recipes", "extras"),
    ("data",),
    ("hub",),
    ("training",),
    ("look",),
    ("benchmarks",),
    ("cli",),
    ("__main__",),
]
# files that travel to the Hub beside the weights, with torch and transformers alone
BUNDLE = [
    "encoder_op",
    "encoder_reference",
    "backends_fastbert",
    "checkpoint_fastbert",
    "configuration_fastbert",
    "dispatch_fastbert",
    "encoder_fastbert",
    "fff_layer",
    "fff_op",
    "fff_reference",
    "heads_fastbert",
    "inference_fastbert",
    "inputs_fastbert",
    "leaf_layer",
    "leaf_op",
    "leaf_reference",
    "leaf_traceable",
    "modeling_fastbert",
    "pretrained_fastbert",
    "quantized_layer",
    "quantized_linear",
    "quantized_op",
    "quantized_reference",
    "quantized_weights",
    "quantizer_fastbert",
]
# a command line, not an import of the package: it lists what the op above it can choose from
EXEMPT = {PACKAGE / "kernels" / "__main__.py"}


def sources(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if ".venv" not in path.parts)


def level_of(module: str) -> int:
    for level, names in enumerate(LEVELS):
        if module in names:
            return level
    raise AssertionError(f"fastbert_hf.{module} is in no level: add it to LEVELS")


def imported_modules(path: Path) -> set[str]:
    """First-level names of this package that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = path.parents[node.level - 1].relative_to(PACKAGE).parts  # where the dots lead
            names |= {(*folder, *(node.module or alias.name).split("."))[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "fastbert_hf":
            files = {child.stem for child in PACKAGE.iterdir()}
            names |= {alias.name if alias.name in files else "__init__" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastbert_hf."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("fastbert_hf.")}
            names |= {"__init__" for a in node.names if a.name == "fastbert_hf"}
    return names


@pytest.mark.parametrize("path", sources(PACKAGE), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    if path in EXEMPT:
        return
    module = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for imported in imported_modules(path):
        assert level_of(imported) <= level_of(module), f"{path.name} imports {imported}, which is above it"


@pytest.mark.parametrize("path", sources(PACKAGE / "training"), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_what_trainings_share_imports_none_of_them(path):
    """training/*.py is shared by its subfolders; a subfolder imports itself and what is shared."""
    folders = {child.name for child in (PACKAGE / "training").iterdir() if (child / "__init__.py").exists()}
    own = path.relative_to(PACKAGE / "training").parts[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastbert_hf.training."):
            imported = node.module.split(".")[2]
            assert imported not in folders or imported == own, f"{path.name} imports {node.module}"


def test_the_package_never_imports_scripts_or_tests():
    for path in sources(PACKAGE):
        assert "import scripts" not in path.read_text() and "from tests" not in path.read_text()


@pytest.mark.parametrize("name", BUNDLE)
def test_bundle_files_import_siblings_torch_and_transformers_only(name):
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    guarded = {child for node in ast.walk(tree) if isinstance(node, ast.Try) for child in ast.walk(node)}
    allowed = {"torch", "transformers", "huggingface_hub"}  # the last comes with transformers
    standard = {
        "collections",
        "contextvars",
        "dataclasses",
        "difflib",
        "functools",
        "json",
        "math",
        "os",
        "pathlib",
        "typing",
        "warnings",
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module in BUNDLE
        elif isinstance(node, ast.ImportFrom) and node not in guarded:
            assert node.module.split(".")[0] in allowed | standard
        elif isinstance(node, ast.Import) and node not in guarded:
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed | standard


def test_functions_stay_small():
    too_long = {
        f"{path.name}:{node.name}": lines
        for path in sources(PACKAGE) + sources(ROOT / "scripts")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and (lines := node.end_lineno - node.lineno + 1) > 60
    }
    assert not too_long


def test_files_stay_small():
    folders = [PACKAGE, ROOT / "scripts", ROOT / "examples", ROOT / "tests"]
    too_long = {
        str(path.relative_to(ROOT)): lines
        for folder in folders
        for path in sources(folder)
        if (lines := len(path.read_text().splitlines())) > 400
    }
    assert not too_long
