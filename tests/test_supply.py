"""Test what comes with the package and what it does without being asked: nothing on the network,
no pickle, no eval, and only files whose content is known."""

import ast
import hashlib
import json
import os
import socket
import subprocess
import sys
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

import symmbfn
from symmbfn.data import load_mp20
from symmbfn.evaluation import evaluate
from symmbfn.stability import load_hull

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "symmbfn"
CONTENTS = json.loads((ROOT / "tests" / "contents.json").read_text())  # file -> its SHA-256


@pytest.fixture
def without_network(monkeypatch):
    "Every connection is an error."

    def refuse(*args, **kwargs):
        raise AssertionError(f"a connection to {args[1:]}")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("python", ["3.11.0", "3.12.0"])
def test_what_is_pinned_can_be_installed_on_every_python_that_we_promise(python):
    "Debian 12 has Python 3.11.2, for which a package that needs 3.11.5 can't be installed."
    needs = {one.name: one.metadata.get("Requires-Python") or "" for one in distributions()}
    assert not [name for name, need in needs.items() if python not in SpecifierSet(need)]


def test_nothing_is_fetched_from_the_network(without_network, tmp_path):
    "Weights, data, hull and potential come with the package."
    made = symmbfn.generate(2, steps=2, best=0.5, progress=False, out=tmp_path / "made")
    assert len(made.structures) == 2 and len(load_mp20()) == 3 and load_hull().elements
    report = evaluate(
        made.structures, train=made.structures, relaxations=0, workers=1, cache=tmp_path / "store"
    )
    assert report["readable"] == 1


def test_data_and_weights_are_what_they_were_when_they_were_checked():
    "Who changes one of these files on purpose writes its digest into tests/contents.json."
    files = [*PACKAGE.glob("*.safetensors"), *PACKAGE.glob("*.csv*"), *PACKAGE.glob("*.json")]
    assert {path.name for path in files} == set(CONTENTS)
    for path in files:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == CONTENTS[path.name], path.name


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_no_module_runs_what_it_reads(path):
    "No pickle, and no eval or exec; torch.load is pickle too."
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
            assert not {"pickle", "dill", "cloudpickle", "shelve", "marshal"} & set(names)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "torch.load", "np.load", "pd.read_pickle")


@pytest.mark.skipif("SYMMBFN_LONG" not in os.environ, reason="builds the package twice")
@pytest.mark.parametrize("kind", ["bdist_wheel", "sdist"])
def test_the_built_package_is_whole(kind, tmp_path):
    "It can be imported from its files alone, and has all data."
    build = [sys.executable, "setup.py", "-q", "egg_info", "-e", tmp_path, kind, "-d", tmp_path]
    subprocess.run(build, cwd=ROOT, check=True)
    (built,) = [path for path in tmp_path.iterdir() if path.suffix in (".whl", ".gz")]
    if built.suffix == ".gz":
        subprocess.run(["tar", "xzf", built, "--strip-components=1"], cwd=tmp_path, check=True)
    else:
        zipfile.ZipFile(built).extractall(tmp_path)
    assert set(CONTENTS) <= {path.name for path in (tmp_path / "symmbfn").iterdir()}
    code = "import symmbfn; print(symmbfn.__file__); print(len(symmbfn.load().meta))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert str(tmp_path) in done.stdout
