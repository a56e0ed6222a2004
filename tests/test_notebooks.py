"Every notebook runs from top to bottom in nbdev's own runner: one test each."

import os
import subprocess
from pathlib import Path

import pytest

root = Path(__file__).parent.parent


@pytest.mark.parametrize("name", sorted(p.name for p in (root / "nbs").glob("*.ipynb")))
def test_notebook(name):
    done = subprocess.run(
        ["nbdev_test", "--path", f"nbs/{name}", "--n_workers", "1"],
        cwd=root,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
