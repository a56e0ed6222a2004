"""With random beliefs in place of the network, every rebuilt crystal has the space group asked for.

`SYMMBFN_LONG=1 pytest -n 0 -s tests/test_symmetry.py -k verdict` compares moyo and spglib often."""

import os

import moyopy
import numpy as np
import pytest
import spglib
import torch
from scipy.spatial import cKDTree

from symmbfn.core import GROUPS, batch_index, concat, per_channel
from symmbfn.data import load_mp20
from symmbfn.generation import sample_crystals
from symmbfn.metrics import detect_space_group, is_valid
from symmbfn.model import load
from symmbfn.reconstruct import primitive, reconstruct, unit_cells
from symmbfn.structures import decode
from symmbfn.wyckoff import lattice_neighbours, symmetry_operations

PER_GROUP = 10
MEAN_K = torch.tensor([0, 0, 0, 0, 0, 2.5])  # cells of 12 Angstrom


@pytest.fixture(scope="module")
def cells():
    "Ten crystals for each of the 230 groups, from beliefs that mean nothing: 2,300 in one batch."
    g = torch.Generator().manual_seed(0)
    G = torch.arange(1, GROUPS + 1).repeat_interleave(PER_GROUP)
    b, _ = batch_index(torch.randint(1, 4, G.shape, generator=g))
    counts = dict(crystal=len(G), site=len(b))

    def random_belief(channel):
        shape = counts[channel.per], *channel.belief_shape
        if channel.kind == "periodic":
            return torch.rand(shape, generator=g, dtype=torch.float64)
        z = torch.randn(shape, generator=g, dtype=torch.float64)
        if channel.kind == "continuous":
            return MEAN_K + 0.1 * z  # not masked: the reconstruction has to do it
        return (3 * z).softmax(-1)

    return unit_cells(*reconstruct(per_channel(random_belief), G, b))


def crystal(cells, i):
    "Space group, lattice vectors, fractional coordinates and elements of one crystal."
    atoms = cells.b == i
    return int(cells.G[i]), cells.L[i].numpy(), cells.frac[atoms].numpy(), cells.Z[atoms].numpy()


def keeps_metric(rotations, L):
    "Whether the rotations leave the dot products of the lattice vectors as they are."
    metric = L @ L.T
    moved = rotations.transpose(0, 2, 1) @ metric @ rotations
    return np.abs(moved - metric).max() < 1e-9 * np.abs(metric).max()


def keeps_atoms(W, frac):
    "Whether the operations map a set of points onto itself."
    images = np.einsum("oij,aj->oai", W[:, :, :3], frac) + W[:, None, :, 3]
    images = images.reshape(-1, 3) % 1 % 1  # the first can give 1.0 by rounding
    return cKDTree(frac, boxsize=1).query(images)[0].max() < 1e-9


def test_every_operation_of_the_group_maps_the_crystal_onto_itself(cells):
    for i in range(len(cells.G)):
        G, L, frac, Z = crystal(cells, i)
        W = symmetry_operations(G).numpy()
        assert keeps_metric(W[:, :, :3], L), (i, G)
        for element in np.unique(Z):
            assert keeps_atoms(W, frac[element == Z]), (i, G)


def shortest_distance(L, frac):
    "Shortest distance between two atoms, Angstrom."
    positions = frac @ L
    translations = lattice_neighbours(torch.zeros(0).double()).numpy() @ L
    copies = (positions + translations[:, None]).reshape(-1, 3)
    return cKDTree(copies).query(positions, k=2)[0][:, 1].min()


def contains(rotations, translations, G):
    "Whether a set of operations contains all of G's."
    for W in symmetry_operations(G).numpy():
        same_rotation = (W[:, :3].round() == rotations).all((1, 2))
        difference = translations[same_rotation] - W[:, 3]
        if not (np.abs(difference - difference.round()) < 1e-3).all(1).any():
            return False
    return True


def test_spglib_and_moyopy_find_the_group_or_a_supergroup(cells):
    looked, exact = 0, 0
    for i in range(len(cells.G)):
        G, L, frac, Z = crystal(cells, i)
        if shortest_distance(L, frac) < 0.5:
            continue  # atoms that overlap are for no symmetry finder to judge
        s = spglib.get_symmetry_dataset((L, frac, Z), symprec=1e-3)
        cell = moyopy.Cell(L.tolist(), frac.tolist(), Z.tolist())
        m = moyopy.MoyoDataset(cell, symprec=1e-3)
        assert contains(s.rotations, s.translations, G), (i, G)
        rotations, translations = np.array(m.operations.rotations), m.operations.translations
        assert contains(rotations, np.array(translations), G), (i, G)
        assert s.number == m.number
        looked += 1
        exact += s.number == G
    print(f"{looked} of {len(cells.G)} without overlap, {exact} with exactly the group")
    assert looked > 1000
    assert exact > 0.5 * looked


def test_primitive_cells_are_the_same_crystals(cells):
    small = primitive(cells)
    volume = torch.linalg.det(cells.L) / torch.bincount(cells.b)
    small_volume = torch.linalg.det(small.L) / torch.bincount(small.b)
    torch.testing.assert_close(small_volume, volume)


def test_the_verdict_is_spglibs_where_moyo_decides():
    "Of crystals of MP-20, and of the network's own as they are sampled, whose atoms are apart."
    n_known, n_made = (11_500, 5400) if "SYMMBFN_LONG" in os.environ else (150, 50)
    known = concat([data.crystals for data in load_mp20().values()])[:n_known]
    model, prior, _ = load()
    raw = dict(seed=3, min_distance=0, repair_rounds=0)
    made = sample_crystals(model, prior, n_made, 20, **raw)
    for crystals in (known, made[is_valid(made).nonzero()[:, 0]]):
        structures = decode(crystals, primitive=True)
        for structure, G in zip(structures, crystals.G.tolist()):
            assert detect_space_group(structure, expected=G) == detect_space_group(structure)
