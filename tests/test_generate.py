"Test with the package's weights that crystals are what is asked for, whatever the batch size."

import pytest
import torch
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Element, Lattice, Structure

import symmbfn
from symmbfn.condition import Request, apply_constraints, sample_constraints
from symmbfn.core import Channels, K
from symmbfn.data import load_mp20, wyckoff_positions
from symmbfn.generation import Structures, sample_crystals
from symmbfn.reconstruct import snap_to_wyckoff, unit_cells
from symmbfn.structures import decode
from symmbfn.wyckoff import symmetry_operations


@pytest.fixture(scope="module")
def trained():
    return symmbfn.load()


def wrapped(difference):
    "Differences of fractional coordinates, to the nearest periodic image."
    return difference - difference.round()


def sample(trained, n, **options):
    "Sample n crystals in float32, in which the batch size may only change the rounding."
    return sample_crystals(trained.model, trained.prior, n, precision="float32", **options)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_the_same_seed_gives_the_same_crystals_in_any_batch(trained, batch_size):
    """Elements and positions are the same for any batch size.

    Coordinates agree up to rounding in float32, which the steps of the sampler amplify."""
    whole = sample(trained, 24, batch_size=256, seed=3)
    other = sample(trained, 24, batch_size=batch_size, seed=3)
    for name in ("G", "b", "a", "S"):
        assert getattr(whole, name).equal(getattr(other, name)), name
    assert wrapped(whole.x - other.x).abs().max() < 1e-2
    assert (whole.k - other.k).abs().max() < 1e-3


def shares(made, symbols):
    "Share of the sites of generated crystals that hold each of some elements."
    Z = [Element(symbol).Z for symbol in symbols]
    return {s: float((made.crystals.a == z).float().mean()) for s, z in zip(symbols, Z)}


def test_weights_of_one_are_no_preference():
    "Bit for bit the same crystals: a factor of 1 adds 0 to the logarithm of a probability."
    options = dict(steps=6, progress=False)
    made = symmbfn.generate(12, **options).crystals
    same = symmbfn.generate(12, prefer=dict.fromkeys(range(1, 95), 1.0), **options).crystals
    for name, value in vars(made).items():
        assert torch.equal(value, getattr(same, name)), name


def test_allowed_elements_have_the_probabilities_of_a_mask(trained):
    "A weight of 0 or 1 does what leaving out forbidden elements does, bit for bit."
    request = Request(elements=(3, 8, 11, 16))
    c = sample_constraints(request, trained.prior, 10)
    n, generator = len(c.b), torch.Generator().manual_seed(0)
    a, S = torch.rand(n, K, generator=generator), torch.rand(n, 15, 13, generator=generator)
    estimate = Channels(torch.zeros(10, 6), torch.zeros(n, 3), a.softmax(-1), S.softmax(-1))
    allowed = torch.isin(torch.arange(1, K + 1), torch.tensor(request.elements))
    masked = estimate.a.log().masked_fill(~allowed, -torch.inf).softmax(-1)
    assert torch.equal(apply_constraints(estimate, c).a, masked)


def test_preferred_elements_occur_more_often():
    "The order of the factors is the order of the shares; what must not occur doesn't."
    options = dict(steps=8, progress=False, forbid="Rb", condition=None)
    found = [
        shares(symmbfn.generate(40, prefer=prefer, **options), ("Na", "O", "Rb"))
        for prefer in ({"Na": 30, "O": 1 / 30}, None, "Na=0.01,O=30")
    ]
    assert found[0]["Na"] > found[1]["Na"] + 0.1 and found[2]["O"] > found[1]["O"] + 0.1
    assert found[0]["O"] < found[1]["O"] and found[2]["Na"] <= found[1]["Na"]
    assert all(share["Rb"] == 0 for share in found)


def maps_onto_itself(frac, Z, operations):
    """Whether every operation maps every atom onto an atom of the same element.

    frac (n,3) and Z (n,) belong to the atoms of one cell, operations (m,3,4) are affine maps."""
    images = torch.einsum("oij,aj->oai", operations[:, :, :3], frac) + operations[:, None, :, 3]
    distance = wrapped(images[:, :, None] - frac).abs().amax(-1)  # (m,n,n)
    same_element = Z[:, None] == Z
    return bool((same_element & (distance < 1e-6)).any(-1).all())


def test_crystals_have_the_operations_of_the_group_asked_for(trained):
    "The group of each crystal is the one asked for, or a supergroup of it."
    crystals = sample(trained, 40, seed=5)
    cells = unit_cells(*snap_to_wyckoff(crystals))
    for i, G in enumerate(crystals.G.tolist()):
        of_crystal = cells.b == i
        frac, Z = cells.frac[of_crystal], cells.Z[of_crystal]
        assert maps_onto_itself(frac, Z, symmetry_operations(G)), (i, G)


def test_structures_are_those_of_decode_and_made_when_they_are_asked_for(trained):
    crystals = sample(trained, 12, seed=5)
    together, made = decode(crystals, primitive=True), Structures(crystals)
    assert len(made) == 12 and list(made) == together
    assert [made[i] for i in range(-12, 12)] == together + together
    assert list(made[3:-2:2]) == together[3:-2:2]
    assert made[0] is not made[0]
    with pytest.raises(IndexError):
        made[12]


def perovskite(large, small):
    "Cubic ABO3 with the large cation among twelve oxygen atoms and the small one among six."
    oxygen = [[0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]]
    places = [[0, 0, 0], [0.5, 0.5, 0.5], *oxygen]
    return Structure(Lattice.cubic(4.0), [large, small, "O", "O", "O"], places)


@pytest.mark.parametrize("large, small", [("Sr", "Ti"), ("Ba", "Zr"), ("Ca", "Ti")])
@pytest.mark.parametrize("positions", ["open", "given"])
def test_the_large_cation_of_a_perovskite_is_among_twelve_oxygen_atoms(large, small, positions):
    request = dict(composition=f"{large}{small}O3", space_group=221, formula_units=1)
    if positions == "given":  # with the small cation in the large one's place
        request = dict(composition=f"{large}{small}O3", template=perovskite(small, large))
    made = symmbfn.generate(24, progress=False, **request).structures
    fit = StructureMatcher().fit
    right = [fit(structure, perovskite(large, small)) for structure in made]
    exchanged = [fit(structure, perovskite(small, large)) for structure in made]
    assert sum(right) + sum(exchanged) == 24 and sum(right) >= 20


PAIRS = [("Li,Mg", "cubic"), ("Li,O", "monoclinic"), ("Mg,O", "hexagonal")]


@pytest.mark.parametrize("elements, system", PAIRS)
def test_elements_and_crystal_systems_are_obeyed_together(elements, system):
    made = symmbfn.generate(4, elements=elements, space_group=system, steps=5, progress=False)
    for structure in made.structures:
        assert {element.symbol for element in structure.elements} == set(elements.split(","))


@pytest.mark.parametrize(
    "request_",
    [
        dict(composition="O5", space_group=225, formula_units=1),
        dict(elements="Li,O,S", n_sites=2),
        dict(composition="MgAl2O4", space_group=227, formula_units=1),
    ],
    ids=str,
)
def test_impossible_requests_are_refused_before_anything_is_sampled(trained, request_, monkeypatch):
    def sample_batch(*args):
        raise AssertionError("This was sampled.")

    monkeypatch.setattr("symmbfn.generation.sample_batch", sample_batch)
    with pytest.raises(ValueError, match="ask for another number"):
        symmbfn.generate(1, model=trained, progress=False, **request_)


def test_positions_of_known_crystals_are_those_the_decoder_gives_them():
    """`wyckoff_positions`, which counts positions in the data, agrees with the decoder.

    The former looks at each site by itself, the latter at all sites of a crystal together."""
    crystals = load_mp20()["val"].crystals
    assert wyckoff_positions(crystals).equal(snap_to_wyckoff(crystals)[1])
