"""Inputs at random: laws hold for all of them, and what is damaged or hostile is refused in a
sentence. `python tests/fuzz.py 100000` tries as many damaged files as one likes."""

import gzip
import warnings
import zipfile

import fuzz
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Lattice, Structure

import symmbfn
from symmbfn.__main__ import main
from symmbfn.condition import sample_constraints
from symmbfn.data import load_mp20
from symmbfn.generation import parse_request
from symmbfn.lattice import CRYSTAL_SYSTEMS, constrain, k_to_lattice, lattice_to_k, lengths_angles
from symmbfn.structures import MAX_ATOMS, encode, load_structures, to_structure

pytestmark = pytest.mark.filterwarnings("ignore")
# without looking for the smallest input that fails, which takes minutes
quick = dict(derandomize=True, database=None, phases=[Phase.generate])
law = settings(max_examples=40, deadline=None, **quick)
few = settings(law, max_examples=8)

numbers = st.floats(-0.6, 0.6)
groups = st.integers(1, 230)


@law
@given(st.lists(numbers, min_size=5, max_size=5), st.floats(0.5, 2.5), groups)
def test_k_and_cells_are_the_same_and_obey_their_group(shape, size, G):
    "Exactly up to rounding; lengths and angles are those that the crystal system prescribes."
    k = constrain(torch.tensor([*shape, size], dtype=torch.float64), torch.tensor(G))
    L = k_to_lattice(k)
    assert torch.allclose(lattice_to_k(L), k, atol=1e-7)
    turn = torch.linalg.qr(torch.from_numpy(np.random.default_rng(G).normal(size=(3, 3)))).Q
    assert torch.allclose(lattice_to_k(L @ turn), k, atol=1e-7)  # however the cell is turned
    a, b, c, alpha, beta, gamma = lengths_angles(L).tolist()
    right = {
        "monoclinic": [(alpha, 90), (gamma, 90)],
        "orthorhombic": [(alpha, 90), (beta, 90), (gamma, 90)],
        "tetragonal": [(a, b), (alpha, 90), (beta, 90), (gamma, 90)],
        "trigonal": [(a, b), (alpha, 90), (beta, 90), (gamma, 120)],
        "hexagonal": [(a, b), (alpha, 90), (beta, 90), (gamma, 120)],
        "cubic": [(a, b), (b, c), (alpha, 90), (beta, 90), (gamma, 90)],
    }
    system = next(name for name, members in CRYSTAL_SYSTEMS.items() if G in members)
    assert all(abs(x - y) < 1e-5 for x, y in right.get(system, []))


@few
@given(st.integers(0, 8000), st.integers(0, 2**32 - 1))
def test_a_crystal_is_the_same_however_its_cell_is_written(number, seed):
    "Atoms in another order, shifted as a whole, in a turned cell: all is the same."
    crystal = load_mp20()["val"].crystals[number : number + 1]
    structure = symmbfn.decode(crystal, primitive=True)[0]
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(structure))
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    turn *= np.linalg.det(turn)  # a mirror image may have another group
    other = Structure(
        structure.lattice.matrix @ turn,
        [structure[i].specie for i in order],
        structure.frac_coords[order] + rng.uniform(size=3),
    )
    first, again = encode([structure]), encode([other])
    assert first.G.equal(again.G)
    assert sorted(first.a.tolist()) == sorted(again.a.tolist())
    assert torch.allclose(first.k[:, 5], again.k[:, 5], atol=1e-5)
    cells = [symmbfn.decode(crystals)[0] for crystals in (first, again)]
    assert StructureMatcher(scale=False).fit(*cells)


elements = st.lists(st.sampled_from(["Li", "Na", "Al", "Si", "O", "S", "Cl", "Ti"]), max_size=4)


@few
@given(groups, elements, elements, st.none() | st.integers(1, 9), st.integers(0, 9))
def test_plans_fulfil_their_request_or_say_why_not(G, required, forbidden, n_sites, seed):
    words = dict(space_group=G, require=required or None, forbid=forbidden or None, n_sites=n_sites)
    try:
        plan = sample_constraints(parse_request(**words), symmbfn.load().prior, 3, seed)
    except ValueError as error:
        fuzz.check_refusal(error)
        return
    assert plan.G.tolist() == [G] * 3
    symbols = {s: fuzz.Structure(np.eye(3) * 9, [s], [[0] * 3])[0].specie.Z for s in forbidden}
    for Z in symbols.values():
        assert not plan.elements[:, Z - 1].any()
    if n_sites:
        assert torch.bincount(plan.b).tolist() == [n_sites] * 3


NAMES = "--space-group --elements --composition --n-sites --lattice --site --keep --condition"
words = st.text(max_size=12) | st.sampled_from([*NAMES.split(), "Fm-3m", "Li,O", "1-230", "nan"])


@law
@given(st.sampled_from(sorted(main.commands)), st.lists(words, max_size=6))
def test_any_words_end_in_a_line(command, words):
    "--out is missing or its folder can't be made, so that nothing is computed."
    words = [word for word in words if word not in ("", "-")]
    done = CliRunner().invoke(main, [command, *words, "--out", "/dev/null/out"])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert "Traceback" not in done.output


# Damaged files


def test_damaged_files_are_read_or_refused_in_a_sentence(tmp_path):
    "300 inputs; an input that ends in another way is written to fuzz_failure.*"
    found, _ = fuzz.try_inputs(300, 7, tmp_path)
    assert found.total() == 300 and min(found["read"], found["refused"]) > 30


# Hostile files

SALT = Structure.from_spacegroup(
    "Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]
)
CIF = SALT.to(fmt="cif")


def refusal(read, *args):
    "The sentence with which something is refused."
    with pytest.raises(ValueError) as caught:
        read(*args)
    return str(caught.value)


def test_what_unpacks_to_too_much_is_refused(tmp_path):
    "A gzipped CIF of 200 MB, and zips of such files, of which some are good."
    large = CIF + "# padding\n" * 20_000_000
    (tmp_path / "bomb.cif.gz").write_bytes(gzip.compress(large.encode(), 1))
    assert "10 MB are the most" in refusal(load_structures, tmp_path / "bomb.cif.gz")
    with zipfile.ZipFile(tmp_path / "some.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("good.cif", CIF)
        archive.writestr("large.cif", large)
    _, (good, bad) = load_structures(tmp_path / "some.zip")
    assert good == CIF and "10 MB are the most" in str(bad)
    with zipfile.ZipFile(
        tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1
    ) as archive:
        for i in range(6):
            archive.writestr(f"{i}.cif", large)
    assert "1,074 MB are the most" in refusal(load_structures, tmp_path / "bomb.zip")


def test_names_in_a_zip_lead_nowhere(tmp_path):
    "Nothing is unpacked to a file; names are only names."
    (tmp_path / "in").mkdir()
    with zipfile.ZipFile(tmp_path / "in" / "some.zip", "w") as archive:
        for name in ("../../escaped.cif", "/absolute.cif", "w\\..\\c.cif", "a/../../b.cif"):
            archive.writestr(name, CIF)
    names, sources = load_structures(tmp_path / "in" / "some.zip")
    assert sources == [CIF] * 4 and len(set(names)) == 4
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["some.zip"]


def test_a_member_of_a_zip_without_a_name_is_no_cif(tmp_path):
    with zipfile.ZipFile(tmp_path / "some.zip", "w") as archive:
        archive.writestr("x.cif", CIF)
    content = (tmp_path / "some.zip").read_bytes()
    (tmp_path / "some.zip").write_bytes(content.replace(b"x.cif", b"\0.cif"))  # names end at \0
    assert "no file whose name ends in .cif" in refusal(load_structures, tmp_path / "some.zip")


def test_a_zip_of_a_version_that_nobody_knows_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "some.zip", "w") as archive:
        archive.writestr("x.cif", CIF)
    content = bytearray((tmp_path / "some.zip").read_bytes())
    content[content.rindex(b"PK\1\2") + 6] = 148  # version that is needed, times ten
    (tmp_path / "some.zip").write_bytes(content)
    assert "zip file version 14.8" in refusal(load_structures, tmp_path / "some.zip")


def with_sites(n):
    "A CIF with so many sites."
    head, _, _ = CIF.partition("  Na  Na0")
    return head + "".join(f"  Na  Na{i}  1  0.{i:07d}  0.5  0.5  1\n" for i in range(n))


@pytest.mark.parametrize("n_atoms", ["2", "1000000000000", "1_000_000_000_000", "9" * 5000])
def test_a_frame_with_fewer_lines_than_atoms_keeps_nobody_waiting(tmp_path, n_atoms):
    "The frame before it is read; ASE would go on reading lines that aren't there."
    whole = '1\nLattice="3 0 0 0 3 0 0 0 3" Properties=species:S:1:pos:R:3 pbc="T T T"\nCu 0 0 0\n'
    path = tmp_path / "frames.extxyz"
    path.write_text(whole + whole.replace("1\n", f"{n_atoms}\n", 1))
    _, (first, second) = load_structures(path)
    assert to_structure(first).composition.formula == "Cu1"
    with pytest.raises(ValueError, match="fewer lines than atoms|Expected xyz header"):
        to_structure(second)


def test_many_atoms_are_refused():
    assert "sites" in refusal(to_structure, with_sites(MAX_ATOMS + 1))
    assert "10 MB are the most" in refusal(to_structure, with_sites(1_000_000))
    many = Structure(np.eye(3) * 100, ["Na"] * (MAX_ATOMS + 1), np.random.rand(MAX_ATOMS + 1, 3))
    assert "more than 10000 atoms" in refusal(to_structure, many)


@pytest.mark.parametrize(
    "composition", ["C1000000", "(" * 5000, "Li" * 5000, "H1e9", "Fe" + "9" * 5000]
)
def test_formulas_out_of_all_proportion_are_refused(composition):
    prior = symmbfn.load().prior

    def plan(composition):
        sample_constraints(parse_request(composition=composition), prior, 1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fuzz.check_refusal(refusal(plan, composition))
