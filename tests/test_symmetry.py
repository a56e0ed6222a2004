"With random beliefs in place of the network, every rebuilt crystal has the space group that was asked for."

import moyopy
import numpy as np
import pytest
import spglib
import torch
from scipy.spatial import cKDTree

from symmbfn.core import AXES, OPS, Channels, K, batch_index
from symmbfn.reconstruct import primitive, reconstruct, unit_cells
from symmbfn.wyckoff import symmetry_operations

PER_GROUP = 10


@pytest.fixture(scope="module")
def cells():
    "Ten crystals for each of the 230 groups, from beliefs that mean nothing: 2,300 in one batch."
    g = torch.Generator().manual_seed(0)
    G = torch.arange(1, 231).repeat_interleave(PER_GROUP)
    b, _ = batch_index(torch.randint(1, 4, G.shape, generator=g))
    k = torch.randn(len(G), 6, generator=g, dtype=torch.float64) * 0.1 + torch.tensor(
        [0, 0, 0, 0, 0, 2.5]
    )  # not masked: that is for the decoder to do
    x = torch.rand(len(b), 3, generator=g, dtype=torch.float64)
    a = torch.randn(len(b), K, generator=g, dtype=torch.float64).softmax(-1)
    S = (3 * torch.randn(len(b), AXES, OPS, generator=g, dtype=torch.float64)).softmax(-1)
    return unit_cells(*reconstruct(Channels(k, x, a, S), G, b))


def one(cells, c):
    return (
        int(cells.G[c]),
        cells.L[c].numpy(),
        cells.frac[cells.b == c].numpy(),
        cells.Z[cells.b == c].numpy(),
    )


def test_every_operation_of_the_group_maps_the_crystal_onto_itself(cells):
    for c in range(len(cells.G)):
        G, L, frac, Z = one(cells, c)
        W = symmetry_operations(G).numpy()
        R, metric = W[:, :, :3], L @ L.T
        assert (
            np.abs(R.transpose(0, 2, 1) @ metric @ R - metric).max() < 1e-9 * np.abs(metric).max()
        )
        for z in np.unique(Z):
            images = (
                (np.einsum("oij,aj->oai", R, frac[z == Z]) + W[:, None, :, 3]).reshape(-1, 3)
                % 1
                % 1
            )
            assert cKDTree(frac[z == Z], boxsize=1).query(images)[0].max() < 1e-9, (c, G)


def contains(found, G):
    "Whether a set of operations (rotations, translations) contains all of G's."
    R, t = found
    for W in symmetry_operations(G).numpy():
        d = t[(W[:, :3].round() == R).all((1, 2))] - W[:, 3]
        if not (np.abs(d - d.round()) < 1e-3).all(1).any():
            return False
    return True


def test_spglib_and_moyopy_find_the_group_or_a_supergroup(cells):
    looked, exact = 0, 0
    for c in range(len(cells.G)):
        G, L, frac, Z = one(cells, c)
        cart = frac @ L
        shifts = np.stack(np.meshgrid(*[[-1, 0, 1]] * 3), -1).reshape(-1, 3) @ L
        near = (
            cKDTree((cart[None] + shifts[:, None]).reshape(-1, 3)).query(cart, k=2)[0][:, 1].min()
        )
        if near < 0.5:
            continue  # atoms that overlap are for no symmetry finder to judge
        d = spglib.get_symmetry_dataset(
            (L, frac, Z), symprec=1e-3
        )  # both finders at a thousandth of an Angstrom
        m = moyopy.MoyoDataset(moyopy.Cell(L.tolist(), frac.tolist(), Z.tolist()), symprec=1e-3)
        assert contains((d.rotations, d.translations), G), (c, G)
        assert contains(
            (np.array(m.operations.rotations), np.array(m.operations.translations)), G
        ), (c, G)
        assert d.number == m.number
        looked, exact = looked + 1, exact + (d.number == G)
    print(f"{looked} of {len(cells.G)} without overlap, {exact} with exactly the group")
    assert looked > 1000 and exact > 0.5 * looked


def test_primitive_cells_are_the_same_crystals(cells):
    small = primitive(cells)
    torch.testing.assert_close(
        torch.linalg.det(cells.L) / torch.bincount(cells.b),
        torch.linalg.det(small.L) / torch.bincount(small.b),
    )
