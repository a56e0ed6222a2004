"The package as a whole: layers, imports, files, notebooks in step."

import ast
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch

root = Path(__file__).parent.parent
notebooks = sorted((root / "nbs").glob("*.ipynb"))


def exported(path):
    "The module a notebook exports to, or None."
    for cell in nbformat.read(path, 4).cells:
        if "#| default_exp" in cell.source:
            return cell.source.split("#| default_exp")[1].split()[0]


number = {exported(p): int(p.name[:2]) for p in notebooks if p.name[:2].isdigit() and exported(p)}


def imports(module):
    "Top-level packages and symmbfn modules that a module imports, anywhere in it."
    outside, inside = set(), set()
    for node in ast.walk(ast.parse((root / "symmbfn" / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            outside |= {a.name.split(".")[0] for a in node.names}
        if isinstance(node, ast.ImportFrom):
            package, _, name = (
                "symmbfn." + (node.module or "") if node.level else node.module
            ).partition(".")
            if package != "symmbfn":
                outside.add(package)
            else:
                inside |= {name} if name else {a.name for a in node.names}
    return outside, inside


@pytest.mark.parametrize("module", sorted(number))
def test_a_module_imports_only_smaller_numbers(module):
    for other in imports(module)[1]:
        assert number[other] < number[module] or (module, other) == ("net", "fused"), (
            f"{module} imports {other}"
        )  # kernels, where there is a GPU


@pytest.mark.parametrize("module", sorted(m for m in number if number[m] <= 12))
def test_the_core_needs_torch_numpy_and_the_standard_library(module):
    assert imports(module)[0] <= {"torch", "numpy"} | sys.stdlib_module_names


def loaded_by(statement):
    code = f"import sys; {statement}; print(*sys.modules)"
    return set(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
        ).stdout.split()
    )


def test_importing_symmbfn_loads_nothing_heavy():
    assert not loaded_by("import symmbfn") & {
        "torch",
        "numpy",
        "pymatgen",
        "pyxtal",
        "moyopy",
        "matplotlib",
    }


def test_training_starts_with_torch_and_numpy_alone():
    packages = lambda statement: (
        {m.split(".")[0] for m in loaded_by(statement)} - sys.stdlib_module_names
    )
    assert packages("import symmbfn.train, symmbfn.sample, symmbfn.reconstruct") - packages(
        "import torch, numpy"
    ) == {"symmbfn"}


def test_public_names_are_there_and_others_are_not():
    import symmbfn

    for name in ("encode", "decode", "load_data", "load", "generate", "evaluate"):
        assert callable(getattr(symmbfn, name)) and name in dir(symmbfn)
    with pytest.raises(AttributeError, match="no attribute 'decoed'"):
        symmbfn.decoed


def test_our_files_are_safetensors(tmp_path):
    "Our writer and reader against the safetensors package, both ways."
    from safetensors.torch import load_file, save_file

    from symmbfn.core import load_tensors, save_tensors

    tensors = {
        "a": torch.randn(3, 4),
        "b": torch.arange(7, dtype=torch.int16),
        "c": torch.randn(2, 1).bfloat16(),
        "d": torch.tensor([True, False]),
        "e": torch.randn(5).half(),
        "f": torch.zeros(0, 2),
        "g": torch.tensor(2.5, dtype=torch.float64),
    }
    save_tensors(tmp_path / "ours.safetensors", tensors, meta={"x": 1})
    save_file(tensors, tmp_path / "theirs.safetensors")
    for loaded in (
        load_file(tmp_path / "ours.safetensors"),
        load_tensors(tmp_path / "theirs.safetensors")[0],
    ):
        assert loaded.keys() == tensors.keys()
        for k, v in tensors.items():
            assert loaded[k].dtype == v.dtype and torch.equal(loaded[k], v)


@pytest.mark.parametrize("path", notebooks, ids=lambda p: p.stem)
def test_notebook_is_fit_to_read(path):
    "Run before the commit, no errors, a title, ids that stay, a size that the web shows."
    nb = nbformat.read(path, 4)
    code = [c for c in nb.cells if c.cell_type == "code" and c.source.strip()]
    assert nb.cells[0].source.startswith("# ") and path.stat().st_size < 300_000
    assert not any(
        place in path.read_text() for place in ("/tmp/", "/root/", "/home/", "site-packages/")
    )
    assert any(c.outputs for c in code) and not any(
        o.output_type == "error" for c in code for o in c.outputs
    )
    assert len({c.id for c in nb.cells}) == len(nb.cells)
