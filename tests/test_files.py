"""What is handed over as crystals: files of every kind, intact and damaged, and objects of other
libraries. What is no crystal is refused in one sentence, before anything is computed."""

import gzip
import json
import os
import shutil
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pymatgen.core import Lattice, Structure
from pymatgen.entries.computed_entries import ComputedStructureEntry
from pymatgen.io.ase import AseAtomsAdaptor

from symmbfn import encode
from symmbfn.structures import load_structures, read_sources, to_structure

SALT = Structure.from_spacegroup(
    "Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]
)
MAGNESIA = Structure.from_spacegroup(
    "Fm-3m", Lattice.cubic(4.21), ["Mg", "O"], [[0, 0, 0], [0.5, 0.5, 0.5]]
)
SALT_CIF, MAGNESIA_CIF = SALT.to(fmt="cif"), MAGNESIA.to(fmt="cif")
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def formulas(structures):
    "Read whatever is given; the formulas of its crystals."
    _, sources = load_structures(structures)
    return [to_structure(s).composition.reduced_formula for s in sources]


def write_folder(path):
    "A folder with two crystals, in two folders, and with copies of them that programs made."
    for folder in ("more", ".ipynb_checkpoints", "__MACOSX"):
        (path / folder).mkdir(parents=True)
    (path / "B.CIF").write_text(MAGNESIA_CIF)
    (path / "more" / "a.cif.gz").write_bytes(gzip.compress(SALT_CIF.encode()))
    copies = ("._B.CIF", ".ipynb_checkpoints/B-checkpoint.cif", "__MACOSX/B.cif", ".hidden.cif")
    for copy in (*copies, "B.cif~", "notes.txt"):
        (path / copy).write_text(SALT_CIF)
    return path


# Folders and archives


def test_copies_in_a_folder_are_no_crystals_and_capitals_are(tmp_path):
    names, _ = load_structures(write_folder(tmp_path / "f"))
    assert names == ["B", "more/a"]
    assert formulas(tmp_path / "f") == ["MgO", "NaCl"]


@pytest.mark.parametrize("top", [".", "..", "deep/er"])
def test_an_archive_gives_what_its_folder_gives(tmp_path, top):
    write_folder(tmp_path / "f")
    with zipfile.ZipFile(tmp_path / "f.zip", "w") as archive:
        for file in (tmp_path / "f").rglob("*"):
            archive.write(file, f"{top}/{file.relative_to(tmp_path / 'f')}")
    assert read_sources(tmp_path / "f.zip") == read_sources(tmp_path / "f")


def test_a_locked_member_of_an_archive_is_its_crystals_reason(tmp_path):
    with zipfile.ZipFile(tmp_path / "f.zip", "w") as archive:
        archive.writestr("a.cif", SALT_CIF)
        archive.writestr("b.cif", MAGNESIA_CIF)
    content = bytearray((tmp_path / "f.zip").read_bytes())
    # the flags of the first member, in its own header and in the list at the end
    for mark, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        content[content.find(mark) + offset] |= 1
    (tmp_path / "f.zip").write_bytes(content)
    locked, read = read_sources(tmp_path / "f.zip").sources
    assert "password" in str(locked) and "MgO" in read


def test_a_name_that_is_not_utf8_can_be_printed(tmp_path):
    folder = os.fsencode(tmp_path)
    for name in (b"M\xfcller.cif", "β.cif".encode(), b"M\xe4ller.cif"):
        with open(folder + b"/" + name, "w") as file:
            file.write(SALT_CIF)
    names, _ = load_structures(tmp_path)
    assert sorted(names) == ["M\\xe4ller", "M\\xfcller", "β"]
    names, _ = load_structures([os.fsdecode(folder + b"/M\xfcller.cif")])
    assert names == ["M\\xfcller"]


# Files that are damaged, or written in other ways


TABLE = pd.DataFrame(dict(id=["a", "b"], cif=[SALT_CIF, MAGNESIA_CIF])).to_csv(index=False)
DAMAGED = {  # name of a file -> its content, and words of the refusal
    "cut.csv": (TABLE[:-200].encode(), "damaged"),
    "row.csv": (b"id,cif\na,b,c\n", "as many fields"),
    "twice.csv": (b"id,cif,id\na,b,c\n", "'id' more than once"),
    "cut.csv.gz": (gzip.compress(TABLE.encode())[:200], "damaged"),
    "cut.zip": (b"PK\3\4 and nothing else", "damaged"),
    "cut.json": (json.dumps(SALT.as_dict())[:-50].encode(), "damaged"),
    "cut.parquet": (b"PAR1 and nothing else", "damaged"),
    "empty.cif": (b"", "empty"),
    "empty.csv": (b"\n", "empty"),
    "no.pdf": (b"%PDF", "of no kind"),
    "POSCAR": (b"NaCl\n1.0\n", "POSCAR"),
}
DAMAGED |= {f"lfs.{end}": (POINTER, "git lfs pull") for end in ("cif", "csv", "zip", "parquet")}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_refused_in_a_sentence(tmp_path, kind):
    content, words = DAMAGED[kind]
    (tmp_path / kind).write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        read_sources(tmp_path / kind)
    assert kind in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "latin-1"])
@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
def test_marks_encodings_and_ends_of_lines_do_not_matter(tmp_path, encoding, ends):
    text = ("# Müller\n" + SALT_CIF).replace("\n", ends)
    (tmp_path / "a.cif").write_bytes(text.encode(encoding))
    _, (source,) = load_structures(tmp_path / "a.cif")
    assert source == "# Müller\n" + SALT_CIF
    assert encode(tmp_path / "a.cif").G.tolist() == [225]


def test_blanks_around_the_names_of_columns_do_not_matter(tmp_path):
    (tmp_path / "a.csv").write_text('id, cif , band_gap\nsalt,"' + SALT_CIF + '",8.5\n')
    read = read_sources(tmp_path / "a.csv")
    assert read.names == ["salt"] and formulas(read.sources) == ["NaCl"]
    assert read.columns == {"band_gap": ["8.5"]}


def test_a_pointer_in_a_folder_is_its_crystals_reason(tmp_path):
    (tmp_path / "a.cif").write_text(SALT_CIF)
    (tmp_path / "b.cif").write_bytes(POINTER)
    good, bad = read_sources(tmp_path).sources
    assert good == SALT_CIF and "git lfs pull" in str(bad)


def test_where_no_file_can_be_read_there_is_nothing_to_compute(tmp_path):
    (tmp_path / "b.cif").write_bytes(POINTER)
    with pytest.raises(ValueError, match="None of 1 crystals .* git lfs pull"):
        read_sources(tmp_path)
    with pytest.raises(ValueError, match="None of 2 crystals .* is not there"):
        read_sources([tmp_path / "none.cif", str(tmp_path / "neither.cif")])


# What people hand over


def write_files(path):
    "One crystal in files of several kinds; their paths."
    (path / "a.cif").write_text(SALT_CIF)
    (path / "a.json").write_text(SALT.to_json())
    (path / "list.json.gz").write_bytes(gzip.compress(json.dumps([SALT.as_dict()]).encode()))
    (path / "named.json").write_text(json.dumps({"salt": SALT.as_dict()}))
    records = [dict(material_id="mp-1", structure=SALT.as_dict())]
    (path / "records.json").write_text(json.dumps(records))
    SALT.to(str(path / "POSCAR"), fmt="poscar")
    shutil.copy(path / "POSCAR", path / "a.vasp")
    pd.DataFrame(dict(CIF=["a.cif"])).to_csv(path / "paths.csv")
    return sorted(path.iterdir())


def test_a_list_of_paths_may_have_files_of_every_kind(tmp_path):
    files = write_files(tmp_path)
    assert formulas(files) == formulas(map(str, files)) == ["NaCl"] * 8
    names, _ = load_structures(files)
    assert names == ["POSCAR", "a", "a", "a", "0", "salt", "0", "mp-1"]
    for file in files:
        assert formulas(file) == ["NaCl"], file


def test_files_of_the_same_name_are_named_by_their_folders(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        SALT.to(str(tmp_path / folder / "POSCAR"), fmt="poscar")
    names, _ = load_structures(sorted(tmp_path.glob("*/POSCAR")))
    assert names == ["one/POSCAR", "two/POSCAR"]


@pytest.mark.parametrize("symprec", [0, -0.1, float("nan"), "0.1", None, True, float("inf")])
def test_a_tolerance_that_makes_no_sense_is_refused_at_once(symprec):
    with pytest.raises(ValueError, match="symprec is .*: give a positive length"):
        encode("none.cif", symprec=symprec)


def objects():
    "One crystal as objects that people have."
    atoms = AseAtomsAdaptor.get_atoms(SALT)
    entry = ComputedStructureEntry(SALT, -3.0)
    return dict(
        structure=SALT,
        atoms=atoms,
        atoms_in_list=[atoms],
        series=pd.Series([SALT]),
        as_dict=SALT.as_dict(),
        as_dicts=[SALT.as_dict()],
        named={"salt": SALT},
        named_texts={"salt": SALT_CIF},
        record={"id": "mp-1", "cif": SALT_CIF},
        entry=entry,
        entry_as_dict=[entry.as_dict()],
        content=SALT_CIF.encode(),
        table=pd.DataFrame(dict(cif=[SALT_CIF])),
        table_of_structures=pd.DataFrame(dict(final=[SALT], energy=[-3.0])),
        table_with_a_gap=pd.DataFrame(dict(CIF=[SALT_CIF])).set_index(pd.Index(["x"], name="id")),
        columns={"cif": [SALT_CIF], "id": ["mp-1"]},
        pairs=(SALT,),
    )


@pytest.mark.parametrize("kind", objects())
def test_objects_are_read(kind):
    assert formulas(objects()[kind]) == ["NaCl"]


def test_a_tolerance_may_be_numpys():
    assert encode(SALT, symprec=np.float32(0.1)).G.tolist() == [225]


def test_an_open_file_is_read(tmp_path):
    (tmp_path / "a.cif").write_text(SALT_CIF)
    with open(tmp_path / "a.cif") as text, open(tmp_path / "a.cif", "rb") as content:
        assert formulas([text, content]) == ["NaCl", "NaCl"]


def test_names_are_those_of_the_table(tmp_path):
    table = pd.DataFrame(dict(cif=[SALT_CIF, None], Material_ID=["mp-1", "mp-2"]))
    for some in (table, table.set_index("Material_ID")):
        names, sources = load_structures(some)
        assert names == ["mp-1", "mp-2"] and sources == [SALT_CIF, ""]


def refused():
    "What is no crystal, and words of the refusal."
    return [
        ([], "no crystals"),
        ({}, "no crystals"),
        ((), "no crystals"),
        ("", "path is empty"),
        (" ", "path is empty"),
        (pd.DataFrame(), "no column cif"),
        (pd.DataFrame(dict(cif=[])), "no crystals"),
        (pd.DataFrame(dict(a=[SALT], b=[SALT])), "no column cif, structure or file, but a, b"),
        (3, "int is no crystal"),
        (None, "NoneType is no crystal"),
        ([3], "first item is int"),
        ([[SALT]], "first item is list"),
        ([("a", SALT)], "first item is tuple"),
    ]


@pytest.mark.parametrize("case", range(13))
def test_what_is_no_crystal_is_refused_at_once(case):
    given, words = refused()[case]
    with pytest.raises(ValueError, match=words):
        read_sources(given)
    with pytest.raises(ValueError, match=words):
        encode(given)


def test_a_path_that_is_not_there_is_refused_at_once():
    for path in ("none.cif", Path("none.cif"), "x" * 5000):
        with pytest.raises(FileNotFoundError, match="is not there"):
            read_sources(path)


def test_a_folder_is_read_file_by_file(tmp_path):
    "A folder takes some memory for each file, but not for what is in it; and no file may change."
    for i in range(300):
        (tmp_path / f"{i:03d}.cif").write_text(SALT_CIF + "#" * 20_000)
    load_structures(tmp_path)
    tracemalloc.start()
    names, sources = load_structures(tmp_path)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(names) == len(sources) == 300 and held / 300 < 2000  # bytes
    assert [to_structure(source).formula for source in sources[298:]] == ["Na4 Cl4"] * 2
    assert sources[-1] == list(sources)[299]
    with pytest.raises(IndexError):
        sources[300]
    (tmp_path / "007.cif").write_text(SALT_CIF)
    (tmp_path / "008.cif").unlink()
    for i in (7, 8):
        with pytest.raises(ValueError, match=f"00{i}.cif has changed while it was in use: start"):
            sources[i]
