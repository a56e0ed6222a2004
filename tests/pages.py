"""Pages whose outputs belong to their source.

python tests/pages.py run 03_lattice  format, execute from top to bottom, clean, record
python tests/pages.py run 21_sample   the same with the parameters of the page's own command
python tests/pages.py check           which pages have other outputs than their source makes

The record stands in the notebook's metadata, under `symmbfn`. Tests compare it with the page.
"""

import ast
import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import nbformat
import papermill
from papermill.cli import _resolve_type

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ROOT / "nbs"
WEIGHTS = ROOT / "symmbfn" / "weights.safetensors"
USES_WEIGHTS = re.compile(r"(?<!np\.)\b(load|generate|sample_cached|screen)\(")


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def code_cells(page):
    return [cell for cell in page.cells if cell.cell_type == "code"]


def skeleton(node):
    "A syntax tree as nested tuples, without positions, docstrings and whatever is empty."
    if isinstance(node, list):
        return tuple(skeleton(v) for v in node if not is_docstring(v))
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [(name, v) for name, v in ast.iter_fields(node) if v not in (None, [])]
    return type(node).__name__, tuple((name, skeleton(v)) for name, v in fields)


def is_docstring(node):
    return isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str)


def source_digest(page) -> str:
    "Of the code of all cells: layout, comments and docstrings don't count."
    code = [skeleton(ast.parse(cell.source)) for cell in code_cells(page)]
    return digest(repr(code).encode())


def outputs_digest(page) -> str:
    outputs = [cell.outputs for cell in code_cells(page)]
    return digest(json.dumps(outputs, sort_keys=True).encode())


def weights_digest() -> str:
    "Of the tensors in the package's weights; the header may change."
    content = WEIGHTS.read_bytes()
    header = int.from_bytes(content[:8], "little")
    return digest(content[8 + header :])


def command(page) -> str | None:
    "The first papermill command in the text of a page."
    for cell in page.cells:
        text = cell.source.replace("\\\n", " ")
        found = re.search(r"papermill nbs/[^`\n]+", text)
        if cell.cell_type == "markdown" and found:
            return " ".join(shlex.split(found[0], comments=True))
    return None


def given_parameters(line: str | None) -> dict:
    "What the `-p NAME VALUE` of a papermill command say."
    words = shlex.split(line or "")
    places = [i for i, word in enumerate(words) if word == "-p"]
    return {words[i + 1]: _resolve_type(words[i + 2]) for i in places}


def default_parameters(page) -> dict:
    "Of the cell with the tag `parameters`; empty if there is none."
    cells = [c for c in page.cells if "parameters" in c.metadata.get("tags", [])]
    lines = [line for cell in cells for line in ast.parse(cell.source).body]
    return {line.target.id: ast.literal_eval(line.value) for line in lines}


def expected_parameters(page) -> dict:
    "What the page's own command makes of its parameters, each of its default's type."
    defaults = default_parameters(page)
    given = given_parameters(command(page))
    return defaults | {k: type(defaults.get(k, v))(v) for k, v in given.items()}


def shown_parameters(page) -> dict | None:
    "The parameters as an output of the page shows them."
    names = default_parameters(page).keys()
    for cell in code_cells(page):
        for output in cell.outputs:
            try:
                value = ast.literal_eval(output.get("data", {}).get("text/plain", ""))
            except (SyntaxError, ValueError):
                continue
            if isinstance(value, dict) and value.keys() == names:
                return value
    return None


def problems(path: Path) -> list[str]:
    "A sentence for everything in which the outputs of a page don't belong to its source."
    page = nbformat.read(path, 4)
    again = f"run `python tests/pages.py run {path.stem}`"
    record = page.metadata.get("symmbfn")
    if record is None:
        return [f"{path.stem} has no record of what made its outputs: {again}."]
    found = []
    if record.source != source_digest(page):
        found.append(f"The code of {path.stem} has changed since its outputs were made: {again}.")
    if record.outputs != outputs_digest(page):
        found.append(f"{path.stem} has other outputs than those recorded: {again}.")
    if not default_parameters(page):
        return found
    stated = command(page)
    if stated is None or f"nbs/{path.name}" not in stated:
        found.append(f"The text of {path.stem} doesn't state the papermill command that made it.")
    elif record.command != stated:
        found.append(
            f"{path.stem} states `{stated}`, but was made by `{record.command}`: "
            f"{again}, or state that."
        )
    if shown_parameters(page) != expected_parameters(page):
        found.append(
            f"{path.stem} shows the parameters {shown_parameters(page)}, but its command and cells "
            f"say {expected_parameters(page)}: end the cell that checks them with `p`, and {again}."
        )
    code = "\n".join(cell.source for cell in code_cells(page))
    if USES_WEIGHTS.search(code) and record.weights != weights_digest():
        found.append(f"{path.stem} was made with other weights than the package's: {again}.")
    return found


def execute(path: Path, parameters: dict):
    "The outputs of a notebook's cells, executed by papermill; what goes to stderr is left out."
    os.environ.pop("IN_TEST", None)  # nbdev_test sets it, and pages then do less
    with tempfile.TemporaryDirectory() as scratch:
        page = papermill.execute_notebook(
            path,
            Path(scratch) / path.name,
            parameters,
            progress_bar=False,
            cwd=ROOT if parameters or default_parameters(nbformat.read(path, 4)) else path.parent,
        )
    return {
        cell.id: [o for o in cell.outputs if o.get("name") != "stderr"] for cell in code_cells(page)
    }


def run(path: Path):
    "Execute a page in place with the parameters that it states, and record it."
    subprocess.run(["ruff", "format", "-q", path], check=True, cwd=ROOT)
    page = nbformat.read(path, 4)
    stated = command(page) if default_parameters(page) else None
    began = time.time()
    outputs = execute(path, given_parameters(stated))
    for cell in code_cells(page):
        cell.outputs = outputs[cell.id]
    nbformat.write(page, path)
    subprocess.run(["nbdev_clean", "--fname", path], check=True, cwd=ROOT)
    page = nbformat.read(path, 4)
    page.metadata["symmbfn"] = dict(
        command=stated,
        source=source_digest(page),
        outputs=outputs_digest(page),
        weights=weights_digest(),
        date=date.today().isoformat(),
        minutes=round((time.time() - began) / 60, 1),
        versions=dict(python=platform.python_version(), torch=version("torch")),
    )
    nbformat.write(page, path)
    print(f"{path.stem}: {time.time() - began:.0f} s, {path.stat().st_size / 1e3:.0f} kB")


def main(action=None, *names):
    paths = [NOTEBOOKS / f"{Path(name).stem}.ipynb" for name in names]
    if action == "run" and names:
        for path in paths:
            run(path)
        return 0
    if action != "check":
        print(__doc__)
        return 2
    found = [line for path in paths or sorted(NOTEBOOKS.glob("*.ipynb")) for line in problems(path)]
    print("\n".join(found) or "Every page's outputs belong to its source.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
