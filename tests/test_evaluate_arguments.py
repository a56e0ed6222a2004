"""What may be given to `evaluate`, and what is refused in a sentence before anything is computed;
and that nothing that was computed is lost, whatever happens to files."""

import csv
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import ase.io
import numpy as np
import pandas as pd
import pytest
from ase.calculators.emt import EMT
from pymatgen.core import Lattice, Structure

import symmbfn
from symmbfn.evaluation import (
    FINGERPRINT,
    MEASURE,
    Store,
    StoreError,
    content_key,
    evaluate,
    run_stage,
)
from symmbfn.stability import ASEPotential, hull_from_table

ROOT = Path(__file__).parent.parent
SITES = [[0, 0, 0], [0.5, 0.5, 0.5]]
SALT = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], SITES)
COPPER = Structure.from_spacegroup("Fm-3m", Lattice.cubic(3.7), ["Cu"], [[0, 0, 0]])
EMT_POTENTIAL = ASEPotential(EMT(), "EMT")
EMT_HULL = hull_from_table("copper", [], [], {"EMT": {"Cu": 0.0}})


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    "An empty folder for caches in each test."
    monkeypatch.setenv("SYMMBFN_CACHE", str(tmp_path / "cache"))


def quick(structures=(SALT,), **settings):
    "Evaluate without relaxations, unless they are asked for."
    return evaluate(structures, **dict(train=[SALT], relaxations=0, workers=1) | settings)


# Numbers and other arguments


@pytest.mark.parametrize("n", [1, 1.0, np.int64(1), np.float32(1), pd.Series([1]).iloc[0]])
def test_numbers_of_other_libraries_are_taken(tmp_path, n):
    settings = dict(potential=EMT_POTENTIAL, hull=EMT_HULL, train=[COPPER])
    report = evaluate(
        [COPPER], relaxations=n, workers=n, seconds=np.float32(n), out=tmp_path / "out", **settings
    )
    assert report.rows[0]["relaxed"]
    about = json.loads((tmp_path / "out" / "about.json").read_text())
    assert about["relaxations"] == 1 and about["seconds"] == 1


REFUSED = [
    (dict(relaxations=-1), "relaxations is -1: give a whole number from 0"),
    (dict(relaxations=1.5), "relaxations is 1.5"),
    (dict(relaxations="3"), "relaxations is '3'"),
    (dict(relaxations=True), "relaxations is True"),
    (dict(relaxations=float("nan")), "relaxations is nan"),
    (dict(workers=-1), "workers is -1: give a whole number from 1"),
    (dict(workers=0), "workers is 0"),
    (dict(seconds=-1), "seconds is -1"),
    (dict(seconds="fast"), "seconds is 'fast'"),
    (dict(device="gpu"), "device is 'gpu'"),
    (dict(device=None), "device is 'None'"),
    (dict(potential="chgnt"), "potential 'chgnt' is unknown: give 'chgnet', 'sevennet', or module"),
    (dict(potential=3), "potential is 3: give a Potential"),
    (dict(potential=EMT()), "potential is .*: give a Potential"),
    (dict(potential=ASEPotential), "potential is .*: give a Potential"),
    (dict(hull=3, relaxations=1), "hull is 3: give a Hull"),
    (dict(train=[]), "no crystals"),
    (dict(test=[3]), "no crystals"),
    (dict(structures=[]), "no crystals"),
]


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_what_makes_no_sense_is_refused_before_anything_is_computed(tmp_path, case):
    settings, words = REFUSED[case]
    with pytest.raises(ValueError, match=words) as caught:
        quick(**settings)
    assert "\n" not in str(caught.value)
    path = tmp_path / "cache" / "evaluate.sqlite"
    assert not path.exists() or not Store(path).keys(MEASURE.key)


def test_a_set_that_is_not_there_is_told_before_the_others_are_computed(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.csv is not there"):
        quick(train=[COPPER], test=tmp_path / "none.csv")
    assert not Store(tmp_path / "cache" / "evaluate.sqlite").keys("read 1")


# Files: names, folders, caches


def test_a_name_that_nobody_can_write_is_written(tmp_path):
    names = ["M\udcfcller", 'a "quoted", name', "two\nlines", "β", "key=value", "back\\slash", ""]
    table = pd.DataFrame(dict(name=names, cif=[COPPER.to(fmt="cif")] * len(names)))
    settings = dict(potential=EMT_POTENTIAL, hull=EMT_HULL, train=[SALT], workers=1)
    report = evaluate(table, out=tmp_path / "out", **settings)
    assert [r["name"] for r in report.rows] == names
    with open(tmp_path / "out" / "structures.csv", encoding="utf-8", newline="") as file:
        assert [r["name"] for r in csv.DictReader(file)] == ["M\\udcfcller", *names[1:]]
    frames = ase.io.read(tmp_path / "out" / "relaxed.extxyz", index=":")
    assert len(frames) == len(names) and all(len(frame) == 1 for frame in frames)
    assert not list((tmp_path / "out").glob(".*"))


def test_names_are_written_where_the_system_knows_ascii_only(tmp_path):
    (tmp_path / "crystals").mkdir()
    for name in (b"\xce\xb2.cif", b"M\xfcller.cif"):
        with open(os.fsencode(tmp_path / "crystals") + b"/" + name, "w") as file:
            file.write(SALT.to(fmt="cif"))
    settings = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONPATH=str(ROOT))
    words = "evaluate crystals --train crystals --relaxations 0 --workers 1 --out report"
    done = subprocess.run(
        [sys.executable, "-m", "symmbfn", *words.split()],
        cwd=tmp_path,
        env=os.environ | settings,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "report" / "structures.csv", encoding="utf-8") as file:
        assert sorted(r["name"] for r in csv.DictReader(file)) == ["M\\xfcller", "β"]


def test_a_report_that_cannot_be_written_is_told_at_once_or_not_lost(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written to .*give another folder"):
        quick(out=tmp_path / "file")
    assert not Store(tmp_path / "cache" / "evaluate.sqlite").keys(MEASURE.key)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("symmbfn.evaluation.write_csv", full)
    with pytest.warns(UserWarning, match="could not be written .*No space left"):
        assert quick(out=tmp_path / "out")["valid"] == 1


def test_a_store_that_cannot_be_used_is_told_in_a_sentence(tmp_path):
    (tmp_path / "text").write_text("this is no data base, " * 100)
    store = Store(tmp_path / "good.sqlite")
    for i in range(300):
        store.put(MEASURE.key, f"{i:032d}", dict(reason="long enough to fill several pages"))
    content = store.path.read_bytes()
    (tmp_path / "cut.sqlite").write_bytes(content[: len(content) // 2])
    for path in (tmp_path / "text", tmp_path, tmp_path / "text" / "inner", tmp_path / "cut.sqlite"):
        with pytest.raises(StoreError, match="Results cannot be kept in .*SYMMBFN_CACHE") as caught:
            quick(cache=path)
        assert "\n" not in str(caught.value)


def test_a_full_disk_is_no_crystals_fault(tmp_path):
    "What was stored before the disk was full stays; no crystal gets the disk as its reason."
    crystals = [Structure(Lattice.cubic(3 + i / 100), ["Fe"], [[0, 0, 0]]) for i in range(40)]
    store = Store(tmp_path / "store.sqlite")
    store.put("some", "key", {})
    pages = store.db.execute("PRAGMA page_count").fetchone()[0]
    store.db.execute(f"PRAGMA max_page_count = {pages + 1}")

    class Full(Store):
        def __init__(self, path):
            super().__init__(path)
            self.db.execute(f"PRAGMA max_page_count = {pages + 1}")

    sources = {content_key(s): s for s in crystals}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("symmbfn.evaluation.Store", Full)
        with pytest.raises(StoreError, match="full"):
            run_stage(MEASURE, sources, store, workers=1)
    done = store.keys(MEASURE.key)
    assert 0 < len(done) < 40
    assert not any(row["reason"] for row in store.rows(MEASURE.key, done))
    rows = run_stage(MEASURE, sources, Store(tmp_path / "store.sqlite"), workers=1)
    assert len(rows) == 40 and not any(row["reason"] for row in rows)


# Limits


def beyond():
    "Crystals that would take minutes and gigabytes, and words of the reasons."
    in_nanometres = SALT.copy()
    in_nanometres.scale_lattice(SALT.volume / 1000)
    return {
        "tiny": (Structure(Lattice.cubic(0.6), ["Fe"], [[0, 0, 0]]), "too dense"),
        "nanometres": (in_nanometres, "too dense"),
        "long": (Structure(Lattice.tetragonal(3, 3000), ["Fe"], [[0, 0, 0]]), "too long"),
        "many": (SALT * (5, 5, 6), "1200 atoms"),
    }


@pytest.mark.parametrize("kind", beyond())
def test_a_crystal_beyond_the_limits_costs_nothing_and_gets_a_sentence(kind):
    crystal, words = beyond()[kind]
    began = time.perf_counter()
    report = quick([crystal, crystal.copy()], test=[SALT], relaxations=None)
    assert time.perf_counter() - began < 60  # nearly all of it loads libraries
    row = report.rows[0]
    assert words in row["limits"] and row["reason"] == "" and row["group"]
    assert words in row["reason_fingerprint"]
    assert words in row["reason_relaxed"] or "closer than" in row["reason_relaxed"]
    assert row["relaxed"] is False


# Processes


def evaluate_in_child(folder):
    report = evaluate([SALT, COPPER], train=[SALT], relaxations=0, workers=2, cache=folder / "c")
    rows = run_stage(
        FINGERPRINT, {str(i): COPPER for i in range(9)}, Store(folder / "c"), workers=2
    )
    data = symmbfn.load_data([SALT, SALT * (2, 1, 1), COPPER], workers=2)
    assert not any(r["reason"] for r in rows)
    (folder / "out").write_text(f"{report['valid']} {len(data)}")


@pytest.mark.parametrize("daemon", [True, False])
def test_evaluate_works_in_a_forked_process(tmp_path, daemon):
    "Also in a daemonic one, which may not start others, and after the parent has had workers."
    sources = {str(i): COPPER for i in range(9)}
    rows = run_stage(FINGERPRINT, sources, Store(tmp_path / "parent.sqlite"), workers=2)
    assert not any(r["reason"] for r in rows)
    context = multiprocessing.get_context("fork")
    child = context.Process(target=evaluate_in_child, args=(tmp_path,), daemon=daemon)
    child.start()
    child.join(120)
    assert child.exitcode == 0
    assert (tmp_path / "out").read_text() == "1.0 3"
