"Test the package as a whole: the order of modules, imports, files, notebooks."

import ast
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "symmbfn"
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
WRITTEN_BY_HAND = {"__init__", "__main__"}
MADE_BY_NBDEV = {"_modidx"}
TRAINING_NEEDS = {"torch", "numpy", "safetensors"}


def module_of(path):
    "Name of the module that a notebook exports, or None."
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "code" and "#| default_exp" in cell.source:
            return cell.source.split("#| default_exp")[1].split()[0]


# module -> number of the notebook that exports it
NUMBERS = {module_of(path): int(path.name[:2]) for path in NOTEBOOKS if module_of(path)}


def imported_names(module):
    "Everything that a module imports, also inside functions, such as 'torch.nn', 'symmbfn.core'."
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            # `from .core import K` has level 1 and module 'core'
            package = "symmbfn." if node.level else ""
            package += node.module or ""
            if package.strip(".") == "symmbfn":  # `from symmbfn import core`
                names |= {f"symmbfn.{alias.name}" for alias in node.names}
            else:
                names.add(package)
    return names


def modules_imported(module):
    "Names of the symmbfn modules that a module imports."
    return {n.split(".")[1] for n in imported_names(module) if n.startswith("symmbfn.")}


def packages_imported(module):
    "Names of the packages that a module imports, without symmbfn and the standard library."
    names = {name.split(".")[0] for name in imported_names(module)}
    return names - {"symmbfn"} - sys.stdlib_module_names


def test_every_module_comes_from_a_notebook():
    modules = {path.stem for path in PACKAGE.glob("*.py")}
    assert modules - WRITTEN_BY_HAND - MADE_BY_NBDEV == set(NUMBERS)


@pytest.mark.parametrize("module", sorted(NUMBERS))
def test_a_module_imports_only_smaller_numbers(module):
    for other in modules_imported(module):
        assert NUMBERS[other] < NUMBERS[module], f"{module} imports {other}"


@pytest.mark.parametrize("module", sorted(m for m in NUMBERS if NUMBERS[m] <= 12))
def test_00_to_12_need_torch_numpy_and_safetensors_alone(module):
    """Some functions import more when they are called: Triton and filelock come with torch, and
    scipy finds the sites for the elements of a request, which training never does."""
    later = {"triton", "filelock"} | ({"scipy"} if module == "condition" else set())
    assert packages_imported(module) <= TRAINING_NEEDS | later


def test_the_base_install_has_what_the_modules_import():
    """settings.ini requires every package that a module imports.

    Notebook 17 is left out: it draws figures, which needs the packages of the notebooks, as do
    files for chemiscope. Triton comes with torch, and monty with pymatgen. Workers on other
    machines need Dask, which has an extra of its own."""
    settings = (ROOT / "settings.ini").read_text()
    base = settings.split("\nrequirements =")[1].split("\nnotebooks_requirements =")[0]
    for module in set(NUMBERS) - {"figures"}:
        for package in packages_imported(module) - {"triton", "monty", "chemiscope", "distributed"}:
            assert f"    {package}" in base, f"{module} imports {package}"


def packages_loaded_by(statement):
    "Names of the packages that are loaded after a statement in a new process."
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    names = {name.split(".")[0] for name in done.stdout.split()}
    return names - sys.stdlib_module_names


def test_importing_symmbfn_loads_nothing_else():
    assert packages_loaded_by("import symmbfn") - packages_loaded_by("pass") == {"symmbfn"}


def test_training_loads_torch_numpy_and_safetensors_alone():
    own = packages_loaded_by("import symmbfn.train, symmbfn.sample, symmbfn.reconstruct")
    added = own - packages_loaded_by("import torch, numpy, safetensors.torch")
    assert added - {"triton"} == {"symmbfn"}  # Triton comes with torch for GPUs


PUBLIC = ["encode", "decode", "load_data", "load", "generate", "evaluate"]
PUBLIC += ["relax", "screen", "predict", "finetune", "vary", "export"]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_is_there(name):
    code = f"import symmbfn; assert callable(symmbfn.{name}) and '{name}' in dir(symmbfn)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_name_that_is_not_there_is_an_error():
    import symmbfn

    with pytest.raises(AttributeError, match="no attribute 'decoed'"):
        symmbfn.decoed  # noqa: B018


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_fit_to_read(path):
    "It has a title, and outputs without errors or paths of a machine, and GitHub can show it."
    page = nbformat.read(path, 4)
    outputs = [o for cell in page.cells if cell.cell_type == "code" for o in cell.outputs]
    assert page.cells[0].source.startswith("# ")
    assert outputs
    assert not any(output.output_type == "error" for output in outputs)
    assert path.stat().st_size < 400_000
    text = path.read_text()
    for place in ("/tmp/", "/root/", "/home/", "site-packages/"):
        assert place not in text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_have_names_of_their_own(path):
    ids = [cell.id for cell in nbformat.read(path, 4).cells]
    assert len(set(ids)) == len(ids)
