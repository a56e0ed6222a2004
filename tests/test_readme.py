"""Test that the examples in README run as they stand, each in an empty folder.

A block that cannot be run here, since it installs something or takes minutes, comes after a comment
that says why and that the page doesn't show: `<!-- not run: five minutes -->`.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
TOUR = README.parent / "nbs" / "index.ipynb"
BLOCK = re.compile(
    r"(?P<comment><!-- not run:.*?-->\s*)?```(?P<language>python|sh)\n(?P<code>.*?)\n```", re.DOTALL
)
COMMANDS = {"python": [sys.executable, "-"], "sh": ["bash", "-e"]}


def examples():
    "List of pairs (language, code), one for each block that is to be run."
    blocks = BLOCK.finditer(README.read_text(encoding="utf-8"))
    return [(block["language"], block["code"]) for block in blocks if not block["comment"]]


def first_lines(value):
    "Name a test by the first two lines of its code that aren't imports, shortened."
    lines = [line for line in value.splitlines() if not line.startswith("import ")]
    return "".join(lines[:2]).strip()[:60]


@pytest.mark.parametrize("language, code", examples(), ids=first_lines)
def test_example_runs_as_it_stands(language, code, tmp_path):
    # as for a reader, who has no folder with the source of the data
    environment = {k: v for k, v in os.environ.items() if k != "SYMMBFN_DATA"}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        COMMANDS[language],
        input=code,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_there_are_examples_in_both_languages():
    assert {language for language, _ in examples()} == {"python", "sh"}


def python_examples():
    "Pairs of the code of a Python block and what README says it prints: None if it says nothing."
    text = README.read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)\n```\n(?:\n```\n(.*?)\n```)?", text, re.DOTALL)
    return [(code, output or None) for code, output in blocks]


def test_python_examples_are_cells_of_the_tour_with_the_same_output():
    page = json.loads(TOUR.read_text(encoding="utf-8"))
    cells = {}
    for cell in page["cells"]:
        if cell["cell_type"] == "code":
            printed = [output.get("text", "") for output in cell["outputs"]]
            cells["".join(cell["source"])] = "".join("".join(text) for text in printed)
    for code, output in python_examples():
        assert code in cells, code
        assert output is None or cells[code].strip("\n") == output, code
    assert len(python_examples()) >= 2
