"""Test that the examples in README run as they stand, each in an empty folder.

A block that cannot be run here, since it installs something or takes minutes, comes after a comment
that says why and that the page doesn't show: `<!-- not run: five minutes -->`.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
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
