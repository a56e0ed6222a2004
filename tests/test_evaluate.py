"""What a user relies on in an evaluation: after being killed it continues; no crystal vanishes; it
works from any script; its numbers agree with published ones where these are known."""

import csv
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import tracemalloc
from collections import Counter
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from pymatgen.core import Composition, Lattice, Structure

import symmbfn
from symmbfn.data import load_mp20
from symmbfn.datasets import whole_file
from symmbfn.evaluation import (
    FINGERPRINT,
    MEASURE,
    SPLITS,
    Store,
    content_key,
    evaluate,
    relaxation,
    run_stage,
)
from symmbfn.metrics import charge_balanced, crystal_statistics
from symmbfn.stability import (
    CHGNetPotential,
    Potential,
    atomic_numbers,
    formation_energy,
    hull_energy,
    hull_from_table,
    load_hull,
    read_columns,
)

ROOT = Path(__file__).parent.parent
RELAX = relaxation(CHGNetPotential())


@pytest.fixture(scope="module")
def mp20():
    return load_mp20()


@pytest.fixture(scope="module")
def small(mp20):
    "24 crystals of MP-20's test set with at most six atoms."
    crystals = mp20["test"].crystals[:300]
    atoms = crystal_statistics(crystals)["atoms"]
    return symmbfn.decode(crystals[np.flatnonzero(atoms < 7)[:24].tolist()], primitive=True)


class Deadly(Structure):
    "A crystal that kills the process that measures it, as a crash in a library would."

    @property
    def is_ordered(self):
        os._exit(3)


class Strange(Structure):
    "A crystal that causes an error that nobody foresaw."

    @property
    def is_ordered(self):
        raise ZeroDivisionError("strange")


def by_key(structures):
    "The crystals as `run_stage` takes them: content key -> structure."
    return {content_key(s): s for s in structures}


def test_a_crystal_that_kills_its_process_stops_no_other(tmp_path, small):
    deadly = Deadly(Lattice.cubic(3), ["Fe"], [[0, 0, 0]])
    strange = Strange(Lattice.cubic(3), ["Co"], [[0, 0, 0]])
    crystals = small[:8] + [deadly, strange] + small[8:20]
    store = Store(tmp_path / "store.sqlite")
    rows = run_stage(FINGERPRINT, by_key(crystals), store, workers=2)
    assert len(rows) == 22
    assert rows[8]["reason"] == "its process died"
    assert "strange" in rows[9]["reason"]
    others = rows[:8] + rows[10:]
    assert all(len(r["structure"]) == 61 and not r["reason"] for r in others)
    rows = run_stage(MEASURE, by_key(crystals[9:]), store, workers=1)
    assert rows[0]["reason"] == "ZeroDivisionError: strange"
    assert all(r["group"] for r in rows[1:])


SCRIPT = """
import sys
from pymatgen.core import Lattice, Structure
from symmbfn.evaluation import MEASURE, Store, content_key, run_stage

crystals = [Structure(Lattice.cubic(3 + i / 100), ["Fe"], [[0, 0, 0]]) for i in range(130)]
rows = run_stage(MEASURE, {content_key(s): s for s in crystals}, Store(sys.argv[1]), workers=2)
print(sum(r["valid"] for r in rows), "valid")
"""


@pytest.mark.parametrize("how", ["stdin", "file"])
def test_workers_start_from_any_script(tmp_path, how):
    "From `python - <<EOF` and from a script without `if __name__ == '__main__'`."
    (tmp_path / "script.py").write_text(SCRIPT)
    name, text = ("-", SCRIPT) if how == "stdin" else ("script.py", "")
    done = subprocess.run(
        [sys.executable, name, "store.sqlite"],
        input=text,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.strip() == "130 valid", done.stderr


def descendants(pid):
    "Ids of all processes that a process has started, directly or not."
    children = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    found = children.stdout.split()
    for child in list(found):
        found += descendants(child)
    return found


def alive(pid):
    "Whether a process runs; one that has ended but still has an entry (a zombie) does not."
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    # the state follows the name, which stands in brackets and may contain anything
    return status.rsplit(")", 1)[1].split()[0] != "Z"


def wait_for(condition, seconds):
    "Wait until a condition holds, at most so many seconds; whether it does."
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def count_writes(store):
    "Let the database list every row that any process adds, in the table `written`."
    store.db.executescript(
        "CREATE TABLE written (stage TEXT, content TEXT);"
        "CREATE TRIGGER count AFTER INSERT ON found BEGIN "
        "INSERT INTO written VALUES (new.stage, new.content); END;"
    )


def prepare_command(folder, structures):
    "Write files of crystals (one is broken) and of a hull; return the command to evaluate them."
    (folder / "cifs").mkdir()
    for i, s in enumerate(structures):
        (folder / "cifs" / f"{i:02d}.cif").write_text(s.to(fmt="cif"))
    (folder / "cifs" / "99.cif").write_text("broken")
    elements = sorted({e.symbol for s in structures for e in s.composition})
    with open(folder / "hull.csv", "w", newline="") as f:
        csv.writer(f).writerows([("formula", "energy_per_atom"), *((e, -3) for e in elements)])
    words = "evaluate cifs --out report --train cifs --hull hull.csv --workers 2 --device cpu"
    return [sys.executable, "-m", "symmbfn", *words.split()]


def test_killed_half_way_it_computes_nothing_twice_and_loses_nothing(tmp_path, small):
    "The command gets SIGKILL during the relaxations; the second time it may finish."
    store = Store(tmp_path / "cache" / "evaluate.sqlite")
    count_writes(store)
    environment = {"SYMMBFN_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    settings = dict(cwd=tmp_path, env=os.environ | environment | {"OMP_NUM_THREADS": "1"})
    command = prepare_command(tmp_path, small)
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **settings
    )
    wait_for(lambda: len(store.keys(RELAX.key)) >= 6 or process.poll() is not None, 300)
    workers = descendants(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL and workers
    assert wait_for(lambda: not any(map(alive, workers)), 20), "workers outlive their parent"
    half = len(store.keys(RELAX.key))
    assert 6 <= half < 25
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, **settings)
    assert done.returncode == 0, done.stderr
    written = store.db.execute("SELECT stage, content FROM written").fetchall()
    # what a worker notes as begun may be written twice, a result may not
    times = Counter(row for row in written if "begun" not in row[0])
    assert set(times.values()) == {1}
    assert len(store.keys(RELAX.key)) == 25
    with open(tmp_path / "report" / "structures.csv") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 25 and rows[-1]["reason"]
    assert all(r["relaxed"] == "True" or r["reason_relaxed"] for r in rows)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), whole_file(path) as unfinished:
        unfinished.write_text("ne")
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.iterdir()] == ["table.csv"]
    assert path.read_text() == "old"
    with whole_file(path) as unfinished:
        unfinished.write_text("new")
    assert path.read_text() == "new"


def test_the_test_set_against_itself(tmp_path, mp20):
    "If crystals of MP-20's test set are evaluated, they are valid, covered and at no distance."
    train, test = mp20["train"][::200][:40], mp20["test"][::200][:40]
    report = evaluate(
        test, train=train, test=test, relaxations=0, workers=1, cache=tmp_path / "store.sqlite"
    )
    coverages = ("coverage_recall", "coverage_precision")
    for name in ("readable", "valid", *coverages, *(f"{name}_pair" for name in coverages)):
        assert report[name] == 1, name
    for name in ("density", "elements", "groups"):
        # not exactly 0: one density is computed from structures, the other from tensors
        assert report[f"distance_{name}_all"] < 1e-3, name
    floor = {x["name"]: x["floor"] for x in report.summary}
    assert floor["valid"] == 1 and floor["distance_density_all"] > 0
    assert [r["name"] for r in report.rows] == test.ids


def test_by_default_crystals_are_compared_with_all_of_mp20(tmp_path, mp20):
    "A crystal of each split is found there by name; that of the test set is covered."
    crystals = {split: mp20[split][[7]] for split in SPLITS}
    structures = [symmbfn.decode(d.crystals, primitive=True)[0] for d in crystals.values()]
    report = evaluate(structures, relaxations=0, workers=1, cache=tmp_path / "store.sqlite")
    assert report.about["compared_with"] == dict(train=26196, val=8957, test=8953)
    for row, (split, data) in zip(report.rows, crystals.items()):
        assert row[f"in_{split}"] == data.ids[0]
    assert report.rows[2]["covered"] and report.rows[2]["covered_pair"]
    assert report["novel_for_train"] == pytest.approx(2 / 3)


def test_charges_are_those_of_smacts_2014_table(mp20):
    crystals = symmbfn.decode(mp20["test"].crystals[:1500], primitive=True)
    balanced = np.mean([charge_balanced(s.composition) for s in crystals])
    assert abs(balanced - 0.896) < 0.001  # SMACT's default table gives 0.909


def test_hull_energies_of_the_materials_project():
    "For every twentieth of 25,421 known ones; over all of them the mean error is 0.0023 eV/atom."
    hull = load_hull()
    table = read_columns(files("symmbfn") / "mp_hull.csv.gz")
    known = [(f, float(e)) for f, e in zip(table["formula"], table["known_hull_energy"]) if e]
    assert len(known) == 25421
    error = np.abs([hull_energy(hull, Composition(f)) - e for f, e in known[::20]])
    assert error.mean() < 0.003
    assert np.quantile(error, 0.9) < 0.006


def test_formation_energies_of_chgnet(mp20):
    "Unrelaxed crystals of MP-20's test set have nearly the Materials Project's formation energies."
    data, hull = mp20["test"][::89], load_hull()
    structures = symmbfn.decode(data.crystals, primitive=True)
    energies = data.properties["formation_energy_per_atom"].tolist()
    known = [(s, e) for s, e in zip(structures, energies) if e == e]  # without nan
    potential = CHGNetPotential()
    error = []
    for start in range(0, len(known), 20):
        batch, expected = zip(*known[start : start + 20])
        for s, energy, e in zip(batch, potential(list(batch))[0], expected):
            error.append(formation_energy(hull, s.composition, float(energy)) - e)
    error = np.array(error)
    print(f"MAE {abs(error).mean():.4f} eV/atom, bias {error.mean():+.4f}, of {len(error)}")
    assert 0.012 < abs(error).mean() < 0.032


@pytest.mark.parametrize(
    "table, words",
    [
        ("", "empty"),
        ("formula,formation_energy_per_atom\n", "empty"),
        ("formula,energy\nNaCl,-2\n", "has no columns"),
        ("formula,formation_energy_per_atom\nNaCl,low\n", "is no number in row 1"),
        ("formula,formation_energy_per_atom\nNaCl\n", "has not as many fields"),
        ("formula,formation_energy_per_atom\nXxO,-1\n", "no element Xx"),
        ("formula,energy_per_atom\nLiO,-3\nO,-4\n", "no entry for the element Li"),
    ],
)
def test_a_table_that_is_no_hull_is_refused_in_a_sentence(tmp_path, table, words):
    (tmp_path / "hull.csv").write_text(table)
    with pytest.raises(ValueError, match=words) as caught:
        load_hull(tmp_path / "hull.csv")
    assert "\n" not in str(caught.value)


def test_what_the_hull_lacks_is_the_crystals_reason(tmp_path):
    "A crystal of elements that the hull doesn't have keeps its energy; nothing else is lost."
    salt = Structure(Lattice.cubic(3.4), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    iron = Structure(Lattice.cubic(2.9), ["Fe", "Fe"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    (tmp_path / "hull.csv").write_text("formula,energy_per_atom\nNa,-1.3\nCl,-1.8\n")
    report = evaluate(
        [salt, iron],
        train=[salt],
        hull=tmp_path / "hull.csv",
        workers=1,
        cache=tmp_path / "store.sqlite",
        out=tmp_path / "report",
    )
    first, second = report.rows
    assert first["e_above_hull"] is not None and first["reason_relaxed"] == ""
    assert second["energy"] is not None and second["e_above_hull"] is None
    assert "Fe" in second["reason_relaxed"]
    about = json.loads((tmp_path / "report" / "about.json").read_text())
    assert about["potential"] == "CHGNet 0.3.0"


def test_a_degenerate_cell_is_evaluated_in_no_time(tmp_path):
    "A cell that no list of neighbours can handle gets a row with reasons, and stops no other."
    sites = [[0, 0, 0], [0.5, 0.5, 0.5]]
    cells = [Lattice.orthorhombic(2e5, 2e5, c) for c in (1e-8, 2e-8)]
    thin = [Structure(cell, ["Na", "Cl"], sites) for cell in cells]
    salt = Structure(Lattice.cubic(3.4), ["Na", "Cl"], sites)
    report = evaluate(
        [*thin, salt],
        train=[salt],
        test=[salt],
        relaxations=2,
        workers=1,
        cache=tmp_path / "store.sqlite",
    )
    for row in report.rows[:2]:
        assert row["shortest_distance"] < 1e-7
        assert not row["valid"] and not row["radii_valid"] and not row["covered"]
        assert row["reason_fingerprint"] and row["reason_relaxed"]
        assert row["unique"] and row["in_train"] is None
    assert report.rows[2]["covered"] and report.rows[2]["in_train"] is not None


def test_a_users_own_potential_works_in_workers(tmp_path):
    "The potential is defined in the script itself, and fails for some crystals."
    script = """
        import numpy as np
        from pymatgen.core import Lattice, Structure
        from symmbfn.stability import Potential, hull_from_table
        import symmbfn

        class Springs(Potential):
            name = "springs"

            def __call__(self, structures):
                if any("Xe" in s.symbol_set for s in structures):
                    raise ValueError("xenon has no springs")
                forces = [np.zeros((len(s), 3)) for s in structures]
                return np.full(len(structures), -3.5), forces, np.zeros((len(structures), 3, 3))

        elements = ["Xe" if i == 5 else "Fe" for i in range(20)]
        crystals = [
            Structure(Lattice.cubic(3 + i / 100), [e], [[0, 0, 0]]) for i, e in enumerate(elements)
        ]
        hull = hull_from_table("iron", [], [], {"springs": {"Fe": -3.0}})
        report = symmbfn.evaluate(
            crystals, train=crystals[:1], hull=hull, potential=Springs(), workers=2,
            cache="store.sqlite",
        )
        print(report["stable"], report.rows[5]["reason_relaxed"], report.rows[6]["e_above_hull"])
    """
    done = subprocess.run(
        [sys.executable, "-"],
        input=textwrap.dedent(script),
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.strip() == "0.95 xenon has no springs -0.5", done.stderr


class Stored(Potential):
    "A potential whose relaxations are in the store already."

    name = "stored"

    def __call__(self, structures):
        raise AssertionError("nothing is left to compute")


def store_results(store, structures):
    "Store rows of all stages, as evaluating the structures would do in hours."
    fingerprint = np.random.default_rng(0).random(61 + 132).tolist()
    for s in structures:
        rows = {
            MEASURE.key: dict(
                formula=s.composition.reduced_formula,
                atoms=len(s),
                elements=len(s.composition),
                density=float(s.density),
                group=1,
                valid=True,
                charge_balanced=True,
            ),
            FINGERPRINT.key: dict(structure=fingerprint[:61], composition=fingerprint[61:]),
            relaxation(Stored()).key: dict(
                relaxed=True,
                energy=-3.0,
                lattice=s.lattice.matrix.tolist(),
                numbers=list(s.atomic_numbers),
                frac=s.frac_coords.tolist(),
                group=1,
            ),
        }
        for stage, row in rows.items():
            store.put(stage, content_key(s), dict(reason="") | row)


def test_an_evaluation_holds_a_few_numbers_of_each_crystal(tmp_path, mp20):
    "The memory that evaluating and writing takes hardly grows with the number of crystals."
    store = Store(tmp_path / "store.sqlite")
    store.db.execute("PRAGMA synchronous = OFF")
    data = mp20["val"]
    data = data[np.flatnonzero(crystal_statistics(data.crystals)["atoms"] < 7)[:500].tolist()]
    store_results(store, symmbfn.decode(data.crystals, primitive=True))
    elements = dict.fromkeys(atomic_numbers(), -3.1)
    settings = dict(
        train=data[:5],
        test=data[5:10],
        hull=hull_from_table("elements", [], [], {"stored": elements}),
        potential=Stored(),
        workers=1,
        cache=store.path,
        out=tmp_path / "report",
    )
    evaluate(data[:200], **settings)  # loads libraries
    peaks = []
    for n in (200, 500):  # a block at least
        tracemalloc.start()
        report = evaluate(data[:n], **settings)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(report.rows) == len(report.relaxed) == n and report["stable"] == 0
        assert report.rows[n - 1]["name"] == data.ids[n - 1]
    growth = (peaks[1] - peaks[0]) / 300  # bytes for one more crystal
    print(f"{growth:.0f} bytes for one more crystal")
    assert growth < 4000  # a structure or a row with fingerprints takes more
