"Test the data that come with the package, and data sets of one's own."

import csv
import gzip
import hashlib
import os
import subprocess
import sys
import zipfile
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch

from symmbfn import load_data
from symmbfn.core import K
from symmbfn.data import load_mp20, load_tensors, pack_crystals, unpack_crystals, wyckoff_positions
from symmbfn.datasets import (
    MP20_PROPERTIES,
    SPLITS,
    encode_mp20,
    encode_source,
    load_fingerprints,
    mp20_file,
    write_fingerprints,
    write_hull,
    write_mp20,
)
from symmbfn.lattice import constrain
from symmbfn.reconstruct import snap_to_wyckoff
from symmbfn.structures import decode, encode, read_cif, read_sources, to_cif, to_structure

PACKAGE = Path(str(files("symmbfn")))
SHIPPED = {  # file -> start of the SHA-256 of its content, and how many bytes it may have
    "mp20.safetensors": ("f6f1817f648919b3", 6e6),
    "mp_hull.csv.gz": ("b41bebb5b371f8e3", 1.5e6),
    "element_references.csv": ("03691f67d79ecb69", 1e4),
    "mp20_test_fingerprints.safetensors": ("5d10a3bd2edc7c1c", 4e6),
}


@pytest.fixture(scope="module")
def mp20():
    "The three splits of MP-20 as Datasets."
    return load_mp20()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    "An empty folder for caches in each test."
    monkeypatch.setenv("SYMMBFN_CACHE", str(tmp_path / "cache"))


def source_folder():
    "The folder that the shipped files were made from, or None."
    folder = Path(os.environ.get("SYMMBFN_DATA") or "none")
    return folder if (folder / "mp_20").is_dir() else None


def largest_distance(x, y):
    "Largest difference of fractional coordinates modulo 1."
    step = (x - y).abs()
    return float(step.minimum(1 - step).max())


def hull_table():
    "Rows of the hull's table, as dicts of text."
    with gzip.open(PACKAGE / "mp_hull.csv.gz", "rt", newline="") as f:
        return list(csv.DictReader(f))


# What comes with the package


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_are_those_that_were_checked(name):
    digest, most = SHIPPED[name]
    content = (PACKAGE / name).read_bytes()
    assert len(content) <= most
    assert hashlib.sha256(content).hexdigest().startswith(digest)


def test_mp20_has_its_splits_and_each_crystal_once(mp20):
    assert {split: len(d) for split, d in mp20.items()} == dict(train=26196, val=8957, test=8953)
    ids = [i for d in mp20.values() for i in d.ids]
    assert len(set(ids)) == len(ids)
    energies = [d.properties["formation_energy_per_atom"] for d in mp20.values()]
    assert [int(y.isnan().sum()) for y in energies] == [1529, 181, 170]
    for d in mp20.values():
        assert sorted(d.properties) == sorted(MP20_PROPERTIES)
        assert d.crystals.a.max() <= K


@pytest.mark.parametrize("split", SPLITS)
def test_mp20_is_exactly_symmetric(mp20, split):
    c = mp20[split].crystals
    on, w = snap_to_wyckoff(c)
    assert torch.equal(w, wyckoff_positions(c)) and torch.equal(on.S, c.S)
    assert largest_distance(on.x, c.x) < 1e-15
    assert torch.equal(constrain(c.k, c.G), c.k)


def test_packing_loses_nothing(mp20):
    c = mp20["val"].crystals
    again = unpack_crystals(pack_crystals(c))
    for field in "GkbaS":
        assert torch.equal(getattr(again, field), getattr(c, field)), field
    assert largest_distance(again.x, c.x) < 1e-15


def test_crystals_survive_a_cif(mp20):
    "A CIF lists the atoms of the tensors, and encodes to the same group, sites and lattice."
    c = mp20["test"].crystals[::45]
    texts = to_cif(c)
    for text, s in zip(texts, decode(c), strict=True):
        read = read_cif(text)
        distances = s.lattice.get_all_distances(s.frac_coords, read.frac_coords)
        assert distances.min(1).max() < 1e-6
        partners = np.array(read.atomic_numbers)[distances.argmin(1)]
        assert partners.tolist() == list(s.atomic_numbers)
    again = encode(texts)
    assert torch.equal(again.G, c.G) and torch.equal(again.n, c.n)
    assert torch.allclose(again.k, c.k, atol=1e-8)
    elements = [[sorted(part.tolist()) for part in v.a.split(v.n.tolist())] for v in (again, c)]
    assert elements[0] == elements[1]


def test_energies_agree_with_the_hull(mp20):
    """Test the energies of the data against the table of the hull.

    No crystal is below the lowest energy of its formula, unless that energy was fitted ("legacy").
    The energy of a crystal minus that above the hull is the hull's known energy."""
    table = {row["formula"]: row for row in hull_table()}
    d = mp20["val"][::3]
    formulas = [s.composition.reduced_formula for s in decode(d.crystals, primitive=True)]
    energies = d.properties["formation_energy_per_atom"].tolist()
    above = d.properties["e_above_hull"].tolist()
    triples = [
        (e, a, table[f]) for e, a, f in zip(energies, above, formulas) if e == e and f in table
    ]
    assert len(triples) > 2800
    for energy, _, row in triples:
        if row["source"] != "legacy":
            assert energy > float(row["formation_energy_per_atom"]) - 1e-5
    known = [(e, a, row["known_hull_energy"]) for e, a, row in triples if row["known_hull_energy"]]
    assert len(known) > 2400
    error = np.array([abs(energy - a - float(hull)) for energy, a, hull in known])
    assert np.quantile(error, 0.99) < 2e-6


def test_mp20_is_what_its_source_says(mp20, tmp_path):
    """Every twentieth row is encoded again, if the source is there, and is what is shipped.

    In any case, writing what is shipped makes the same file."""
    rebuilt = encode_mp20(slice(None, None, 20)) if source_folder() else {}
    for split, part in rebuilt.items():
        shipped = mp20[split][::20]
        assert part.ids == shipped.ids
        for field in "GbaS":
            assert torch.equal(getattr(part.crystals, field), getattr(shipped.crystals, field))
        assert torch.allclose(part.crystals.k, shipped.crystals.k, rtol=0, atol=1e-12)
        assert largest_distance(part.crystals.x, shipped.crystals.x) < 1e-12
        for name in MP20_PROPERTIES:
            y, z = part.properties[name], shipped.properties[name]
            assert torch.allclose(y, z, rtol=0, atol=0, equal_nan=True)
    write_mp20(tmp_path / "again.safetensors", mp20)
    new, _ = load_tensors(tmp_path / "again.safetensors")
    old, _ = load_tensors(PACKAGE / "mp20.safetensors")
    assert old.keys() == new.keys()
    for name, value in old.items():
        assert torch.allclose(value, new[name], rtol=0, atol=1e-15, equal_nan=True), name


def test_hull_is_what_its_source_says(tmp_path):
    rows = hull_table()
    assert len(rows) == len({row["formula"] for row in rows}) == 89313
    assert sum(bool(row["known_hull_energy"]) for row in rows) == 25421
    folder = source_folder()
    if folder and (folder / "mp_hull").is_dir():
        write_hull(tmp_path / "again.csv.gz", folder / "mp_hull")
        with gzip.open(tmp_path / "again.csv.gz", "rt", newline="") as f:
            assert list(csv.DictReader(f)) == rows


def test_fingerprints_are_those_of_the_test_set(mp20, tmp_path):
    """Some fingerprints are computed again, from the CIF if the source is there.

    Otherwise from the shipped crystals, in which atoms are moved onto exact symmetry, so that the
    fingerprints of the structure agree less closely."""
    from symmbfn.metrics import composition_fingerprint, structure_fingerprint

    prints = {k: v.numpy() for k, v in load_fingerprints().items()}
    assert prints["structure"].shape == (8953, 61) and prints["composition"].shape == (8953, 132)
    index = list(range(0, 8953, 900))
    if source_folder():
        sources = read_sources(mp20_file("test")).sources
        structures = [to_structure(sources[i]) for i in index]
    else:
        structures = decode(mp20["test"].crystals[index], primitive=True)
    structure = np.stack([structure_fingerprint(s) for s in structures])
    composition = np.stack([composition_fingerprint(s.composition) for s in structures])
    assert abs(composition - prints["composition"][index]).max() < 2e-3
    error = abs(structure - prints["structure"][index]).max(1)
    if source_folder():
        assert error.max() < 1e-4
    assert np.median(error) < 1e-3
    write_fingerprints(tmp_path / "again.safetensors", **load_fingerprints())
    new, _ = load_tensors(tmp_path / "again.safetensors")
    old, _ = load_tensors(PACKAGE / "mp20_test_fingerprints.safetensors")
    assert all(torch.equal(new[k], old[k]) for k in old)


# One's own data


@pytest.fixture(scope="module")
def some(mp20):
    "Twenty crystals as rows of a table, dicts with id, cif, gap and note."
    d = mp20["test"][::450]
    gaps = ["" if gap != gap else f"{gap:.3f}" for gap in d.properties["band_gap"].tolist()]
    texts = to_cif(d.crystals, d.ids)
    return [dict(id=i, cif=t, gap=g, note="n/a") for i, t, g in zip(d.ids, texts, gaps)]


def write_table(path, rows):
    "Write a CSV file with a row for each dict. Returns the path."
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as f:
        out = csv.DictWriter(f, list(rows[0]))
        out.writeheader()
        out.writerows(rows)
    return path


# each of these writes the rows into a folder, and returns the path for `load_data`


def make_csv(path, rows):
    return write_table(path / "mine.csv", rows)


def make_parquet(path, rows):
    import pandas as pd

    pd.DataFrame(rows).to_parquet(path / "mine.parquet")
    return path / "mine.parquet"


def make_folder(path, rows):
    for row in rows:
        file = path / "mine" / f"{row['id']}.cif"
        file.parent.mkdir(exist_ok=True)
        file.write_text(row["cif"])
    return path / "mine"


def make_zip(path, rows):
    with zipfile.ZipFile(path / "mine.zip", "w") as archive:
        for row in rows:
            archive.writestr(f"{row['id']}.CIF", row["cif"])
            archive.writestr(f"__MACOSX/._{row['id']}.cif", "no crystal")
    return path / "mine.zip"


def make_extxyz(path, rows):
    import ase.io
    from pymatgen.io.ase import AseAtomsAdaptor

    frames = [AseAtomsAdaptor.get_atoms(read_cif(row["cif"])) for row in rows]
    for atoms, row in zip(frames, rows):
        atoms.info = {"id": row["id"]} | ({"gap": float(row["gap"])} if row["gap"] else {})
    ase.io.write(path / "mine.extxyz", frames)
    return path / "mine.extxyz"


@pytest.mark.parametrize("make", [make_csv, make_parquet, make_folder, make_zip, make_extxyz])
def test_every_kind_of_file_gives_the_same_data(tmp_path, some, make, capsys):
    data = load_data(make(tmp_path, some))
    assert [len(data[split]) for split in SPLITS] == [16, 2, 2]
    assert "20 of 20 crystals are used" in capsys.readouterr().out
    rows = {row["id"]: row for row in some}
    given = encode([row["cif"] for row in some])
    groups = dict(zip(rows, given.G.tolist()))
    assert sorted(i for d in data.values() for i in d.ids) == sorted(rows)
    for d in data.values():
        assert d.crystals.G.tolist() == [groups[i] for i in d.ids]
        if make not in (make_folder, make_zip):
            gaps = [float(rows[i]["gap"] or "nan") for i in d.ids]
            assert np.allclose(d.properties["gap"].numpy(), gaps, equal_nan=True)
    again = load_data(tmp_path / "cache" / "datasets" / next(cached(tmp_path)))
    assert again["test"].ids == data["test"].ids


def cached(tmp_path):
    "Names of the data sets in the cache."
    return (p.name for p in (tmp_path / "cache" / "datasets").glob("*.safetensors"))


def test_bad_rows_are_counted_and_listed(tmp_path, some, capsys):
    rows = [
        *some,
        dict(some[0], id="no text", cif=""),
        dict(some[0], id="no crystal", cif="data_\n"),
    ]
    data = encode_source(make_csv(tmp_path, rows))
    assert data.ids == [row["id"] for row in some]
    out = capsys.readouterr().out
    assert "20 of 22 crystals are used" in out and "1 left out: there is no CIF" in out
    listed = next((tmp_path / "cache" / "datasets").glob("*.bad.csv"))
    assert str(listed) in out
    with open(listed, newline="") as f:
        assert [(r["row"], r["id"]) for r in csv.DictReader(f)] == [
            ("21", "no text"),
            ("22", "no crystal"),
        ]


def refusals(rows):
    "Pairs of rows that are refused and words in the message."
    return [
        ([*rows, rows[0]], "identifier"),
        ([dict(rows[0], cif="")], "none of 1 crystals can be used"),
        (rows[:2], "three at least"),
        ([{"formula": "NaCl"}], "no column cif"),
    ]


@pytest.mark.parametrize("case", range(4))
def test_what_is_no_data_is_refused_in_a_sentence(tmp_path, some, case):
    rows, words = refusals(some)[case]
    with pytest.raises(ValueError, match=words):
        load_data(make_csv(tmp_path, rows))


def test_a_text_column_is_refused_only_as_a_property(tmp_path, some):
    data = load_data(make_csv(tmp_path, some))["train"]
    assert data.targets(["gap"]).shape == (16, 1)
    with pytest.raises(ValueError, match="note is no property, since 'n/a' is not a number"):
        data.targets(["note"])


@pytest.mark.parametrize("workers", [0, -1, "two", 1.5, True])
def test_workers_that_make_no_sense_are_refused_at_once(tmp_path, workers):
    with pytest.raises(ValueError, match="workers is .*: give a whole number from 1"):
        load_data(tmp_path / "none.csv", workers=workers)


def test_a_cache_that_cannot_be_written_loses_nothing(tmp_path, some, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SYMMBFN_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="could not be kept"):
        assert len(encode_source(make_csv(tmp_path, some))) == 20


@pytest.mark.parametrize("how", ["script", "standard input"])
def test_workers_start_from_a_plain_script(tmp_path, some, how):
    "The script has no `if __name__ == '__main__':`, and may be piped into Python."
    make_csv(tmp_path, some)
    code = "import symmbfn\ndata = symmbfn.load_data('mine.csv', workers=2)\n"
    code += "print(len(data['train']), 'to train')\n"
    (tmp_path / "plain.py").write_text(code)
    command = [sys.executable, "plain.py" if how == "script" else "-"]
    done = subprocess.run(
        command,
        input=code,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert done.returncode == 0 and "16 to train" in done.stdout, done.stderr
