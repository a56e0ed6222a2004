"The weights that come with the package, as a user gets them: from a wheel, outside the checkout, without a network."

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import symmbfn
from symmbfn.core import load_tensors
from symmbfn.data import condition_prior

root = Path(__file__).parent.parent
weights = root / "symmbfn" / "weights.safetensors"

OFFLINE = """
import socket, sys
def refuse(*_): raise OSError("this test has no network")
socket.socket.connect = refuse
import symmbfn
assert symmbfn.__file__.startswith(sys.argv[1]), symmbfn.__file__
model, counts, meta = symmbfn.load()
import torch
from symmbfn.core import local
from symmbfn.reconstruct import reconstruct, unit_cells
from symmbfn.sample import Noise, sample
G = torch.tensor([225, 62])
b, _ = local(torch.tensor([2, 3]))
theta = sample(model, G, b, model.settings, Noise(0, torch.arange(len(G)), b), 5)
print(len(unit_cells(*reconstruct(theta, G, b)).Z), "atoms,", meta["training"]["epoch"], "epochs")
assert "pymatgen" not in sys.modules
"""


def test_load_works_from_a_wheel(tmp_path):
    shutil.copytree(
        root,
        tmp_path / "src",
        ignore=shutil.ignore_patterns(".git", "runs", "nbs", "build", "dist", "*.egg-info"),
    )
    pip = lambda *words: subprocess.run(
        [sys.executable, "-m", "pip", *map(str, words), "-q", "--no-deps", "--no-index"], check=True
    )
    pip("wheel", tmp_path / "src", "--no-build-isolation", "-w", tmp_path / "dist")
    pip("install", *(tmp_path / "dist").glob("*.whl"), "--target", tmp_path / "site")
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(tmp_path / "site")],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)


def test_weights_are_small_and_say_what_they_are():
    assert weights.stat().st_size <= 30e6
    tensors, about = load_tensors(weights)
    assert {v.dtype for k, v in tensors.items() if k.startswith("net.")} <= {
        torch.bfloat16,
        torch.float16,
    }
    meta = about["meta"]
    assert meta["data"]["crystals"] and all(
        len(digest) == 64 for digest in meta["data"]["content"].values()
    )
    assert (
        meta["curve"][-1]["epoch"] >= meta["training"]["epoch"]
        and 0 < meta["metrics"]["ways"]["ours"]["shares"]["valid"] <= 1
    )
    model, prior, _ = symmbfn.load()
    assert (
        not model.training
        and prior.sizes.shape[0] == 231
        and prior.sizes.sum() == meta["data"]["crystals"]["train"]
    )
    assert prior.examples.shape == (
        meta["data"]["crystals"]["train"],
        2 + len(model.settings["properties"]),
    )
    G, n = prior.examples[:, :2].long().T
    assert (
        torch.zeros_like(prior.sizes)
        .index_put_((G, n), torch.ones(len(G), dtype=torch.float64), accumulate=True)
        .equal(prior.sizes)
    )
    for target in (-0.5, -2.8, -4.0):
        near = sorted(
            (r for r in prior.examples.tolist() if r[2] == r[2]), key=lambda r: abs(r[2] - target)
        )[:300]
        asked = condition_prior(prior, torch.tensor([target, torch.nan])).sizes
        size = (asked.sum(0) * torch.arange(asked.shape[1])).sum() / asked.sum()
        assert (
            abs(size - sum(r[1] for r in near) / 300) < 0.1
            and abs(asked[225].sum() - sum(r[0] == 225 for r in near)) < 3
        )


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda raw: raw[:-10], "damaged"),
        (lambda raw: raw[: 10**6] + bytes([raw[10**6] ^ 1]) + raw[10**6 + 1 :], "damaged"),
        (lambda raw: b"nothing", "not a safetensors file"),
    ],
)
def test_damaged_weights_are_refused(tmp_path, change, words):
    (tmp_path / "w.safetensors").write_bytes(change(weights.read_bytes()))
    with pytest.raises(ValueError, match=f"w.safetensors.*{words}"):
        symmbfn.load(tmp_path / "w.safetensors")
