"""Test `relax` and `screen`: what is killed goes on, symmetry is kept, lists are what they say.

Copper and gold with EMT, a potential of ASE that takes no time, so that a screen takes seconds."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from ase.calculators.emt import EMT
from click.testing import CliRunner
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Lattice, Structure

from symmbfn.__main__ import main
from symmbfn.data import load_mp20
from symmbfn.evaluation import Computer, Store, formula_key
from symmbfn.metrics import detect_space_group
from symmbfn.screening import (
    GENERATED,
    BudgetSpent,
    Journal,
    KnownCrystals,
    block_seed,
    cell_of,
    find_in,
    funnel_of,
    relax,
    screen,
)
from symmbfn.stability import ASEPotential
from symmbfn.structures import decode

POTENTIAL = "ase.calculators.emt:EMT"
QUESTION = dict(elements="Cu,Au", space_group="cubic", potential=POTENTIAL)
QUESTION |= dict(n=50, max_crystals=12, block_size=4, steps=5, workers=1, progress=False)
WORDS = "--elements Cu,Au --crystal-system cubic --steps 5 --block-size 4 --workers 1 --no-progress"
WORDS = f"screen --n 50 --max-crystals 12 --potential {POTENTIAL} {WORDS}".split()
FCC = [[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]]

pytestmark = pytest.mark.usefixtures("one_thread")


def run(*words):
    "Run a command in this process. Returns click's Result: exit_code, output, stderr."
    return CliRunner().invoke(main, [str(word) for word in words])


def spent(**question):
    "What a screen found whose budget is too small for what is asked."
    with pytest.raises(BudgetSpent) as caught:
        screen(**question)
    return caught.value.screened


def blocks_of(folder):
    "The rows of each block in the folder of a screen, without the times."
    paths = sorted((folder / "blocks").glob("*.json"))
    return [json.loads(path.read_text())["rows"] for path in paths]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "The folder of a screen of three blocks that nothing interrupted, and what it found."
    folder = tmp_path_factory.mktemp("whole") / "screen"
    return folder, spent(**QUESTION, out=folder)


def test_killed_and_started_again_it_loses_and_repeats_nothing(whole, tmp_path):
    "Killed by -9 a random time after its first block is there, and once more a bit later."
    folder, _ = whole
    out = tmp_path / "screen"
    command = [sys.executable, "-m", "symmbfn", *WORDS, "--out", out]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **quiet)
    while not list(out.glob("blocks/*.json")):
        assert process.poll() is None
        time.sleep(0.05)
    second = run(*WORDS, "--out", out)  # while the first is at work
    time.sleep(np.random.default_rng().uniform(0, 2))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert second.exit_code == 2 or len(blocks_of(out)) == 3
    assert "Another process is at work" in second.stderr or len(blocks_of(out)) == 3

    there = {path: path.read_bytes() for path in (out / "blocks").glob("*.json")}
    assert there
    done = run(*WORDS, "--out", out)
    assert done.exit_code == 1, done.output
    assert all(path.read_bytes() == content for path, content in there.items())
    assert blocks_of(out) == blocks_of(folder)
    for name in ("ranking.csv", "generated.csv", "crystals/samples.csv"):
        assert (out / name).read_bytes() == (folder / name).read_bytes(), name
    numbers = pd.read_csv(out / "generated.csv")["crystal"].tolist()
    assert numbers == list(range(12))


def test_a_larger_budget_goes_on_and_another_request_is_refused(whole, tmp_path):
    folder = shutil.copytree(whole[0], tmp_path / "screen")
    first = blocks_of(folder)
    spent(**QUESTION | dict(max_crystals=16), out=folder)
    assert blocks_of(folder)[:3] == first and len(blocks_of(folder)) == 4
    for other in (dict(seed=1), dict(max_energy=0.2), dict(elements="Cu,Pt"), dict(steps=6)):
        with pytest.raises(ValueError, match="not of this request"):
            screen(**QUESTION | other, out=folder)
    assert len(blocks_of(folder)) == 4


def test_the_list_is_ranked_different_and_adds_up(whole):
    folder, found = whole
    table = pd.read_parquet(folder / "ranking.parquet")
    assert len(table) > 0 and table["rank"].tolist() == list(range(1, len(table) + 1))
    assert table["e_above_hull"].is_monotonic_increasing
    assert table["e_above_hull"].max() <= 0.1
    fit = StructureMatcher().fit
    for i, structure in enumerate(found.structures):
        assert structure.composition.reduced_formula == table["formula"][i]
        assert not any(fit(structure, other) for other in found.structures[:i])
    generated = pd.read_csv(folder / "generated.csv")
    assert len(generated) == 12 == found.funnel["crystals"][0]
    assert found.funnel["crystals"].is_monotonic_decreasing
    assert found.funnel["crystals"].iloc[-1] == (generated["fate"] == "novel").sum()
    assert generated["fate"].notna().all()
    assert (folder / "best.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((folder / "crystals").glob("*.cif"))) == len(table)


def test_known_crystals_are_those_that_the_matcher_finds(whole):
    "pymatgen's matcher by itself, on all crystals of MP-20 that consist of copper and gold."
    _, found = whole
    alloys = {}
    for data in load_mp20().values():
        elements = data.crystals.a.split(data.crystals.n.tolist())
        for i in range(len(data)):
            if set(elements[i].tolist()) <= {29, 79}:
                alloys[data.ids[i]] = decode(data.crystals[i : i + 1], primitive=True)[0]
    fit = StructureMatcher().fit
    for structure, known in zip(found.structures, found.table["known"]):
        same = {name for name, other in alloys.items() if fit(structure, other)}
        assert known in same if isinstance(known, str) else not same
    assert found.table["known"].notna().any()


def test_what_is_given_as_known_is_known(whole, tmp_path):
    "A crystal that a screen found, given in another cell, is known by its file's name."
    _, found = whole
    composition = formula_key(dict(reason="", formula=found.table["formula"][0]))
    row = dict(composition=composition, relaxed_cell=cell_of(found.structures[0]))
    found.structures[0].make_supercell([1, 1, 2], in_place=False).to(str(tmp_path / "mine.cif"))
    compute = Computer(Store(tmp_path / "store"), 1, disable=True)
    given = KnownCrystals([tmp_path / "mine.cif"], compute)
    del given.sets["train"], given.sets["val"], given.sets["test"]
    assert find_in(given, [row]) == ["mine"]
    del given.sets["known 0"]
    assert find_in(given, [row]) == [None]
    with pytest.raises(ValueError, match="give a list of sets"):
        screen(**QUESTION, known="mine.csv")


def test_seeds_of_blocks_differ():
    seeds = {block_seed(seed, number) for seed in range(30) for number in range(30)}
    assert len(seeds) == 900


def test_the_funnel_counts_fates():
    fates = ["invalid", "copy", "copy", "too high", "known", "novel"]
    lines = funnel_of(Counter(fates), {"relaxed": 2})
    assert [line["crystals"] for line in lines] == [6, 5, 3, 3, 2, 2, 1]
    assert sum(line["seconds"] for line in lines) == 2


def test_the_table_of_all_crystals_has_all_their_columns(whole):
    folder, _ = whole
    rows = [row for block in blocks_of(folder) for row in block]
    names = {name for row in rows for name in row}
    assert names - set(GENERATED) == {"start_cell", "relaxed_cell", "composition"}
    text, columns = (
        pd.read_csv(folder / "generated.csv"),
        pd.read_parquet(folder / "generated.parquet"),
    )
    assert list(text) == list(columns) == list(GENERATED)
    for name in ("crystal", "copy_of", "e_above_hull", "group_relaxed"):
        expected = pd.Series([row.get(name) for row in rows], dtype=float)
        np.testing.assert_array_equal(columns[name].astype(float), expected)
        np.testing.assert_allclose(text[name].astype(float), expected, rtol=1e-12)


def test_earlier_blocks_are_in_files_and_not_in_memory(tmp_path):
    "What a screen keeps of a crystal that isn't listed: a few hundred bytes, not its two cells."
    cell = dict(lattice=np.eye(3).tolist(), frac=np.random.rand(20, 3).tolist(), numbers=[29] * 20)
    journal = Journal(tmp_path)

    def block(number, size=50):
        rows = [
            dict(crystal=number * size + i, composition=f"Cu{i}Au{number}", fate="too high")
            | dict(start_cell=cell, relaxed_cell=cell)
            for i in range(size)
        ]
        return json.loads(json.dumps(dict(number=number, seed=0, rows=rows, seconds={})))

    for number in range(20):
        journal.add(block(number))
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for number in range(20, 60):
        journal.add(block(number))
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    per_crystal = (after - before) / (40 * 50)
    whole_row = len(json.dumps(block(0)["rows"][0]))
    assert per_crystal < 800 < whole_row
    again = Journal(tmp_path)
    assert (again.n_blocks, again.n_crystals, again.fates) == (60, 3000, {"too high": 3000})
    (found,) = again.of_same_composition([dict(composition="Cu7Au30")])
    assert found["crystal"] == 1507 and found["relaxed_cell"] == cell
    assert again.of_same_composition([dict(composition="Cu7")]) == []


BROKEN = """
from ase.calculators.emt import EMT


class Moody(EMT):
    def calculate(self, atoms=None, *args, **kwargs):
        if 79 in atoms.numbers:
            raise RuntimeError("no gold today")
        super().calculate(atoms, *args, **kwargs)


def make():
    return Moody()
"""


def test_a_calculator_that_raises_costs_one_crystal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "moody.py").write_text(BROKEN)
    for element, a in dict(Cu=3.7, Ag=4.1, Au=4.1).items():
        Structure(Lattice.cubic(a), [element] * 4, FCC).to(f"{element}.cif")
    done = run("relax", tmp_path, "--potential", "moody:make", "--workers", 1, "--out", "out")
    assert done.exit_code == 0, done.output
    table = pd.read_csv(tmp_path / "out" / "relaxed.csv").set_index("name")
    assert "no gold today" in table["reason_relaxed"]["Au"]
    assert table["relaxed"].to_dict() == dict(Ag=True, Au=False, Cu=True)
    assert len(list((tmp_path / "out").glob("*.cif"))) == 2
    frames = (tmp_path / "out" / "crystals.extxyz").read_text()
    assert frames.count("energy_per_atom=") == 2
    again = run("relax", tmp_path, "--potential", POTENTIAL, "--out", "out")
    assert again.exit_code == 2 and "not of this request" in again.stderr


def test_kept_symmetry_is_kept_and_agrees_with_free_at_a_minimum():
    "With EMT: alloys of all ratios, stretched. spglib looks at the ends with a small tolerance."
    emt = ASEPotential(EMT(), "EMT")
    alloys = []
    for elements in (["Cu"] * 4, ["Au", "Cu", "Cu", "Cu"], ["Au", "Au", "Cu", "Cu"]):
        crystal = Structure(Lattice.cubic(3.8), elements, FCC)
        crystal.apply_strain(0.02)
        alloys.append(crystal)
    options = dict(fmax=1e-3, workers=1, progress=False)
    kept, kept_table = relax(alloys, emt, **options)
    free, free_table = relax(alloys, emt, symmetry="free", **options)
    for start, end, other in zip(alloys, kept, free):
        assert detect_space_group(end, 1e-5) == detect_space_group(start, 1e-5)
        assert StructureMatcher(scale=False).fit(end, other)
        assert abs(end.volume / other.volume - 1) < 1e-3
    assert np.allclose(kept_table["energy"], free_table["energy"], atol=1e-5)
    again, _ = relax(kept, emt, **options)  # a crystal at its minimum stays there
    for one, other in zip(kept, again):
        assert np.allclose(one.lattice.abc, other.lattice.abc, atol=1e-6)


def test_relaxations_that_were_killed_go_on(tmp_path, monkeypatch):
    "What is kept is not computed again: a potential that fails now changes nothing."
    crystals = [Structure(Lattice.cubic(a), ["Cu"] * 4, FCC) for a in (3.6, 3.7)]
    options = dict(workers=1, progress=False, out=tmp_path / "out")
    first = relax(crystals, ASEPotential(EMT(), "EMT"), **options)
    (tmp_path / "out" / "relaxed.csv").unlink()

    def fail(self, structures):
        raise AssertionError("This was computed again.")

    monkeypatch.setattr(ASEPotential, "__call__", fail)
    again = relax(crystals, ASEPotential(EMT(), "EMT"), **options)
    assert again.table["energy"].tolist() == first.table["energy"].tolist()
    assert (tmp_path / "out" / "relaxed.csv").exists()


def test_generate_relaxes_at_once(tmp_path):
    words = "generate --n 2 --steps 5 --composition TiO2 --space-group 136 --no-progress --relax"
    done = run(*words.split(), "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    table = pd.read_parquet(tmp_path / "out_relaxed" / "relaxed.parquet")
    assert len(table) == 2 and table["relaxed"].all()
    assert table["group_relaxed"].tolist() == table["space_group"].tolist()  # 136 or more
    assert (table["energy"] < table["start_energy"]).all()


@pytest.mark.parametrize(
    "words, said",
    [
        ("--elements Na,Cu --potential ase.calculators.emt:EMT", "no energy of the element Na"),
        ("--elements Cu --potential nothing:make", "No module named 'nothing'"),
        ("--elements Po,O", "has no entry for Po"),
        ("--composition C600", "the most that can be planned"),
        ("--composition O5 --space-group 225 --formula-units 1", "ask for another number"),
        ("--elements Cu --known nowhere", "nowhere is not there"),
        ("--elements Cu --fmax -1", "fmax is -1"),
        ("--elements Cu --block-size 0", "block_size is 0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_generated(words, said, tmp_path):
    done = run("screen", "--n", 1, *words.split(), "--out", tmp_path / "out")
    assert done.exit_code == 2, done.output
    assert said in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
