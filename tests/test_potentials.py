"Potentials by name: SevenNet, whose energies get the Materials Project's corrections."

import pickle
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from pymatgen.core import Lattice, Structure

from symmbfn import relax
from symmbfn.__main__ import main
from symmbfn.stability import SEVENNET, load_potential, mp_correction, predict, sevennet


def rock_salt(cation, anion, a):
    spots = [[0, 0, 0], [0.5, 0.5, 0.5]]
    return Structure.from_spacegroup("Fm-3m", Lattice.cubic(a), [cation, anion], spots)


MAGNESIA = rock_salt("Mg", "O", 4.25)
# the Materials Project's formation energies, eV/atom
FORMATION = {"MgO": -3.053, "CaO": -3.306, "NaCl": -2.110}
START = {"MgO": MAGNESIA, "CaO": rock_salt("Ca", "O", 4.84), "NaCl": rock_salt("Na", "Cl", 5.69)}


def test_sevennet_gives_formation_energies_of_the_materials_project(tmp_path, monkeypatch):
    "With the corrections, which are 0.3 eV/atom here, and with its own elements."
    pytest.importorskip("sevenn")
    monkeypatch.setenv("SYMMBFN_CACHE", str(tmp_path))
    table = relax(START.values(), "sevennet", workers=1, progress=False).table
    assert table["relaxed"].all()
    for formula, energy in zip(table["formula"], table["formation_energy"]):
        assert abs(energy - FORMATION[formula]) < 0.08, (formula, energy)
        assert mp_correction(START[formula]) < -0.3


def test_sevennet_goes_to_other_processes():
    pytest.importorskip("sevenn")
    potential = load_potential("sevennet")
    sent = pickle.loads(pickle.dumps(potential))
    assert potential.name == sent.name == SEVENNET
    (energy, forces, _), (same, _, _) = (predict(p, [MAGNESIA])[0] for p in (potential, sent))
    assert energy == same and np.abs(forces).max() < 1e-3


def test_without_the_package_it_says_what_to_install(tmp_path, monkeypatch):
    "Before anything is written."
    monkeypatch.setitem(sys.modules, "sevenn.calculator", None)
    sevennet.cache_clear()
    MAGNESIA.to(filename=str(tmp_path / "mine.cif"))
    words = ["relax", str(tmp_path / "mine.cif"), "--potential", "sevennet"]
    done = CliRunner().invoke(main, [*words, "--out", str(tmp_path / "relaxed")])
    assert done.exit_code != 0 and "pip install 'symmbfn[sevennet]'" in done.output
    assert not (tmp_path / "relaxed").exists()
    with pytest.raises(ImportError, match="needs sevenn"):
        load_potential("sevennet")


def test_corrections_follow_the_structure():
    "Oxygen counts by its bonds, and a metal only where it is calculated with U."
    squeezed = Structure(Lattice.cubic(6), ["Na", "O", "O"], [[0] * 3, [0.5] * 3, [0.5, 0.5, 0.74]])
    apart = Structure(Lattice.cubic(6), ["Na", "O", "O"], [[0] * 3, [0.5] * 3, [0.5, 0.5, 0]])
    peroxide, oxide = 2 * -0.465 / 3, 2 * -0.687 / 3
    assert np.isclose(mp_correction(squeezed), peroxide)
    assert np.isclose(mp_correction(apart), oxide)
    with_u, without = (mp_correction(rock_salt("Ni", anion, 4.2)) for anion in ("F", "Cl"))
    assert np.isclose(with_u, (-0.462 - 2.541) / 2) and np.isclose(without, -0.614 / 2)
