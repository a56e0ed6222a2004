"Files for other programs: what `generate` and `relax` leave is there, and comes back."

import json
import shutil

import pandas as pd
import pytest
from click.testing import CliRunner
from pymatgen.core import Lattice, Structure

from symmbfn import export, generate
from symmbfn.__main__ import main
from symmbfn.exporting import WRITERS, collect_crystals, optimade_entry
from symmbfn.structures import read_sources

SALT = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0] * 3, [0.5] * 3])


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    "Four crystals and the folder that they are in."
    folder = tmp_path_factory.mktemp("generated") / "crystals"
    return folder, generate(4, steps=4, device="cpu", progress=False, out=folder)


@pytest.mark.parametrize("ending", WRITERS)
def test_the_table_of_a_folder_goes_with_its_crystals(generated, ending, tmp_path):
    "The folder, its CIFs and its table, and the object give the same."
    folder, made = generated
    assert export(folder, tmp_path / f"folder{ending}") == 4
    assert export(made, tmp_path / f"object{ending}") == 4
    for name in ("folder", "object"):
        _, structures, rows = collect_crystals(tmp_path / f"{name}{ending}")
        expected = made.table[["formula", "space_group", "density"]].to_dict("records")
        assert [{k: row[k] for k in expected[0]} for row in rows] == expected
        for structure, original in zip(structures, made.structures):
            assert structure.composition.reduced_formula == original.composition.reduced_formula


def test_an_entry_has_what_optimade_asks_for():
    "Rock salt by hand, as the specification defines each field."
    entry = optimade_entry("salt", SALT, {"e_above_hull": 0.0})
    values = entry["attributes"]
    assert entry["id"] == "salt" and entry["type"] == "structures"
    assert values["elements"] == ["Cl", "Na"] and values["elements_ratios"] == [0.5, 0.5]
    assert values["chemical_formula_reduced"] == "ClNa"
    assert values["chemical_formula_anonymous"] == "AB"
    assert values["nsites"] == len(values["species_at_sites"]) == 8
    assert values["dimension_types"] == [1, 1, 1] and values["nperiodic_dimensions"] == 3
    assert values["_symmbfn_e_above_hull"] == 0.0
    spinel = optimade_entry("", Structure(Lattice.cubic(4), ["Mg", "Al", "Al"], [[0] * 3] * 3), {})
    assert spinel["attributes"]["chemical_formula_anonymous"] == "A2B"
    oxygen = optimade_entry("", Structure(Lattice.cubic(4), ["O"] * 4, [[0] * 3] * 4), {})
    assert oxygen["attributes"]["chemical_formula_reduced"] == "O"  # not O2
    assert "_symmbfn_band_gap__ev" in optimade_entry("", SALT, {"Band gap, eV": 1.0})["attributes"]


def test_bad_entries_are_named_and_the_others_read(tmp_path):
    good = optimade_entry("good", SALT, {})
    torn = dict(id="torn", type="structures", attributes=dict(lattice_vectors=[[1, 0, 0]]))
    shared = json.loads(json.dumps(good)) | dict(id="shared")
    species = shared["attributes"]["species"][0]
    species |= dict(chemical_symbols=["Cl", "Br"], concentration=[0.5, 0.5])
    file = tmp_path / "answer.json"
    file.write_text(json.dumps(dict(data=[good, torn, shared])))
    found = read_sources(file)
    assert found.names == ["good", "torn", "shared"]
    assert "damaged" in str(found.sources[1]) and "partial occupancy" in str(found.sources[2])
    with pytest.raises(ValueError, match="torn: its description is damaged"):
        export(file, tmp_path / "all.db")
    assert not (tmp_path / "all.db").exists()
    (tmp_path / "broken.db").write_text("no database")
    with pytest.raises(ValueError, match="no database of ASE"):
        read_sources(tmp_path / "broken.db")


def test_a_file_of_ones_own_has_no_values_and_takes_none_away(generated, tmp_path):
    folder = shutil.copytree(generated[0], tmp_path / "more" / "crystals")
    SALT.to(str(folder / "salt.cif"))
    assert export(tmp_path / "more", tmp_path / "all.db") == 5
    _, _, rows = collect_crystals(tmp_path / "all.db")
    assert [("density" in row) for row in rows] == [True] * 4 + [False]


def test_relaxations_that_failed_are_left_out(tmp_path):
    "An object with a structure for one of two crystals, as `relax` returns it."

    class Relaxed:
        structures = [SALT, None]
        table = pd.DataFrame(dict(energy=[-3.4, None], reason_relaxed=["", "failed"]))

    assert export(Relaxed, tmp_path / "one.db") == 1
    assert collect_crystals(tmp_path / "one.db")[2][0]["energy"] == -3.4


def test_command(generated, tmp_path):
    out = tmp_path / "crystals.db"
    done = CliRunner().invoke(main, ["export", str(generated[0]), "--out", str(out)])
    assert done.exit_code == 0 and "4 crystals are in" in done.output
    again = CliRunner().invoke(main, ["export", str(generated[0]), "--out", str(out)])
    assert again.exit_code == 2 and "is there already" in again.output
