"Test with the package's weights that crystals are what is asked for, whatever the batch size."

import pytest
import torch

import symmbfn
from symmbfn.data import load_mp20, wyckoff_positions
from symmbfn.generation import sample_crystals
from symmbfn.reconstruct import snap_to_wyckoff, unit_cells
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
