"""The examples of README run as they stand there, each in an empty folder.

A block that cannot be run here, since it installs something or takes minutes, has a comment before
it, which no reader sees and which says why: `<!-- not run: five minutes -->`.
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
    "Language and code of each block that is to be run."
    found = BLOCK.finditer(README.read_text(encoding="utf-8"))
    return [(block["language"], block["code"]) for block in found if not block["comment"]]


def first_line(value):
    "A name for a test: the first line that does something."
    lines = [line for line in value.splitlines() if not line.startswith("import ")]
    return "".join(lines[:2]).strip()[:60]


@pytest.mark.parametrize("language, code", examples(), ids=first_line)
def test_example_runs_as_it_stands(language, code, tmp_path):
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
