"The weights that come with the package, as a user gets them: from a wheel, without a network."

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import symmbfn
from symmbfn.core import batch_index
from symmbfn.data import condition_prior, load_mp20, load_tensors, wyckoff_positions
from symmbfn.generation import STABLE_ENERGY
from symmbfn.wyckoff import wyckoff_table

root = Path(__file__).parent.parent
weights = root / "symmbfn" / "weights.safetensors"

OFFLINE = """
import socket, sys
def refuse(*_): raise OSError("this test has no network")
socket.socket.connect = refuse
import symmbfn
assert symmbfn.__file__.startswith(sys.argv[1]), symmbfn.__file__
model, prior, meta = symmbfn.load()
import torch
from symmbfn.core import batch_index
from symmbfn.reconstruct import reconstruct, unit_cells
from symmbfn.sample import CrystalNoise, sample
G = torch.tensor([225, 62])
b, _ = batch_index(torch.tensor([2, 3]))
noise = CrystalNoise(0, torch.arange(len(G)), b)
beliefs = sample(model, G, b, model.settings, noise, steps=5)
cells = unit_cells(*reconstruct(beliefs, G, b))
print(len(cells.Z), "atoms,", meta["training"]["epoch"], "epochs")
assert "pymatgen" not in sys.modules
"""


def pip(*words):
    "Run pip on what is here alone."
    command = [sys.executable, "-m", "pip", *map(str, words), "-q", "--no-deps", "--no-index"]
    subprocess.run(command, check=True)


def test_load_works_from_a_wheel(tmp_path):
    source, wheels, site = tmp_path / "src", tmp_path / "dist", tmp_path / "site"
    left_out = shutil.ignore_patterns(".git", "runs", "nbs", "build", "dist", "*.egg-info")
    shutil.copytree(root, source, ignore=left_out)
    pip("wheel", source, "--no-build-isolation", "-w", wheels)
    pip("install", *wheels.glob("*.whl"), "--target", site)
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(site)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)


def test_weights_take_half_the_bytes():
    tensors, _ = load_tensors(weights)
    assert weights.stat().st_size <= 30e6
    dtypes = {v.dtype for name, v in tensors.items() if name.startswith("net.")}
    assert dtypes <= {torch.bfloat16, torch.float16}


def test_weights_say_what_they_are():
    model, _, meta = symmbfn.load()
    assert not model.training
    assert meta["data"]["crystals"]
    assert all(len(digest) == 64 for digest in meta["data"]["content"].values())
    assert meta["curve"][-1]["epoch"] >= meta["training"]["epoch"]
    assert 0 < meta["metrics"]["ways"]["ours"]["shares"]["valid"] <= 1


def test_prior_counts_the_training_set():
    model, prior, meta = symmbfn.load()
    n_crystals = meta["data"]["crystals"]["train"]
    assert prior.sizes.shape[0] == 231
    assert prior.sizes.sum() == n_crystals
    assert prior.examples.shape[1] == 2 + len(model.settings["properties"])
    assert prior.n_data == n_crystals  # judged crystals come after those of the data
    G, n = prior.examples[:n_crystals, :2].long().T
    one = torch.ones(n_crystals, dtype=prior.sizes.dtype)
    counted = torch.zeros_like(prior.sizes).index_put_((G, n), one, accumulate=True)
    assert counted.equal(prior.sizes)
    assert prior.max_atoms == 20  # of MP-20


def test_prior_has_positions_that_crystals_can_have():
    "Letters of each example, ascending: all are of its group, and fixed points hold one site."
    _, prior, _ = symmbfn.load()
    table = wyckoff_table()
    G, n = prior.examples[:, :2].long().T
    assert len(prior.letters) == n.sum()
    example, place = batch_index(n)
    w = table.first[G[example]] + prior.letters
    assert (w < table.first[G[example] + 1]).all()
    after = w.diff()[place[1:] > 0]
    assert (after >= 0).all()
    is_fixed = table.dof[w[1:]] == 0
    assert (after[is_fixed[place[1:] > 0]] > 0).all()
    known = load_mp20()["train"].crystals
    assert w[: len(known.b)].equal(
        torch.cat([v.sort().values for v in wyckoff_positions(known).split(known.n.tolist())])
    )


@pytest.mark.parametrize("target", [-0.5, -2.8, -4.0])
def test_prior_of_a_property_is_that_of_the_nearest_crystals(target):
    _, prior, _ = symmbfn.load()
    energy = prior.examples[:, 2]
    distance = (energy - target).abs().nan_to_num(torch.inf)
    nearest = prior.examples[distance.argsort()[:300]]
    sizes = condition_prior(prior, torch.tensor([target, torch.nan])).sizes
    mean_size = (sizes.sum(0) * torch.arange(sizes.shape[1])).sum() / sizes.sum()
    assert abs(mean_size - nearest[:, 1].mean()) < 0.1
    assert abs(sizes[225].sum() - (nearest[:, 0] == 225).sum()) < 3


def test_judged_crystals_are_like_the_default_target():
    _, prior, _ = symmbfn.load()
    data = prior.examples[: prior.n_data]
    energy = prior.examples[:, 3]
    order = (energy - STABLE_ENERGY).abs().nan_to_num(torch.inf).argsort()[:300]
    assert (order >= prior.n_data).double().mean() > 0.95  # nearly all are judged ones
    nearest = prior.examples[order]
    sizes = condition_prior(prior, torch.tensor([torch.nan, STABLE_ENERGY])).sizes
    mean_size = (sizes.sum(0) * torch.arange(sizes.shape[1])).sum() / sizes.sum()
    assert abs(mean_size - nearest[:, 1].mean()) < 0.1
    assert mean_size < 0.8 * (data[:, 1].mean())  # what succeeds is small

    lithium_oxygen = torch.zeros(94, dtype=torch.bool)
    lithium_oxygen[[3 - 1, 8 - 1]] = True  # for two elements the known crystals count
    few = dict(y=torch.tensor([torch.nan, STABLE_ENERGY]))
    few |= dict(allowed=lithium_oxygen, required=lithium_oxygen)
    of_data = prior._replace(
        examples=data, elements=prior.elements[: prior.n_data], n_data=torch.tensor(-1)
    )
    sizes = condition_prior(of_data, **few).sizes
    torch.testing.assert_close(condition_prior(prior, **few).sizes, sizes)


def without_its_end(raw):
    return raw[:-10]


def with_a_flipped_bit(raw):
    return raw[: 10**6] + bytes([raw[10**6] ^ 1]) + raw[10**6 + 1 :]


def replaced(raw):
    return b"nothing"


@pytest.mark.parametrize(
    "change, words",
    [
        (without_its_end, "damaged"),
        (with_a_flipped_bit, "damaged"),
        (replaced, "not a safetensors file"),
    ],
)
def test_damaged_weights_are_refused(tmp_path, change, words):
    (tmp_path / "w.safetensors").write_bytes(change(weights.read_bytes()))
    with pytest.raises(ValueError, match=f"w.safetensors.*{words}"):
        symmbfn.load(tmp_path / "w.safetensors")
