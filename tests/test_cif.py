"""CIF files as databases, journals and programs write them: the same crystal, or the true reason.

nbs/29_reading.ipynb does the same with random crystals, written in many ways by spglib."""

import warnings

import gemmi
import numpy as np
import pytest
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Lattice, Structure

from symmbfn import decode, encode
from symmbfn.structures import read_cif, to_cif

CELL = ("length_a", "length_b", "length_c", "angle_alpha", "angle_beta", "angle_gamma")
COLUMNS = "label type_symbol fract_x fract_y fract_z"
CUBIC = (5.64, 5.64, 5.64, 90, 90, 90)
SALT = ("Na1 Na 0 0 0", "Cl1 Cl 0.5 0.5 0.5")
ALONE = "loop_\n_symmetry_equiv_pos_as_xyz\n'x, y, z'"


def cif(cell, symmetry, atoms, formula=None, columns=COLUMNS, head="data_x", Z=None):
    "Write a CIF by hand."
    lines = [head]
    lines += [f"_chemical_formula_sum '{formula}'"] if formula else []
    lines += [f"_cell_formula_units_Z {Z}"] if Z else []
    lines += [f"_cell_{key} {value}" for key, value in zip(CELL, cell)]
    lines += [symmetry, "loop_", *[f"_atom_site_{column}" for column in columns.split()]]
    return "\n".join([*lines, *atoms]) + "\n"


def operations(symbol):
    ops = gemmi.find_spacegroup_by_name(symbol).operations()
    lines = [f"'{op.triplet()}'" for op in ops]
    return "\n".join(["loop_", "_symmetry_equiv_pos_as_xyz", *lines])


def symbol(name):
    return f"_symmetry_space_group_name_H-M '{name}'"


def number(G):
    return f"_symmetry_Int_Tables_number {G}"


def salt(symmetry=None, atoms=SALT, formula="Na Cl", **more):
    "Rock salt, unless something is changed."
    if symmetry is None:
        symmetry = number(225) + "\n" + operations("F m -3 m")
    return cif(CUBIC, symmetry, atoms, formula, **more)


def hexagonal(a, c):
    return (a, a, c, 90, 90, 120)


def sulfide(x, y):
    "MoS2 with one pair of coordinates, which stands for 1/3 and 2/3."
    atoms = [f"Mo1 Mo {x} {y} 0.25", f"S1 S {x} {y} 0.621"]
    return cif(hexagonal(3.16, 12.29), operations("P 63/m m c"), atoms, "Mo S2")


RUTILE = ["Ti1 Ti 0 0 0", "O1 O 0.305 0.3052 0"]
PYRITE = ["Fe1 Fe 0 0 0", "S1 S 0.385 0.385 0.386"]
LAVES = ["Mg1 Mg 0.3333 0.6667 0.062", "Zn1 Zn 0 0 0", "Zn2 Zn 0.830 0.659 0.25"]
CACU5 = ["Ca1 Ca 0 0 0", "Cu1 Cu 0.333 0.667 0", "Cu2 Cu 0.5 0 0.5"]
ROUNDED = {  # text, formula of the cell, space group
    "rutile": (
        cif((4.59, 4.59, 2.96, 90, 90, 90), operations("P 42/m n m"), RUTILE),
        "Ti2 O4",
        136,
    ),
    "pyrite": (cif((5.417,) * 3 + (90,) * 3, operations("P a -3"), PYRITE), "Fe4 S8", 205),
    "MgZn2": (cif(hexagonal(5.22, 8.57), operations("P 63/m m c"), LAVES), "Mg4 Zn8", 194),
    "CaCu5": (cif(hexagonal(5.08, 4.09), operations("P 6/m m m"), CACU5), "Ca1 Cu5", 191),
    "two digits": (sulfide("0.33", "0.67"), "Mo2 S4", 194),
    "three digits": (sulfide("0.333", "0.667"), "Mo2 S4", 194),
    "three digits, cut off": (sulfide("0.333", "0.666"), "Mo2 S4", 194),
    "negative": (sulfide("-0.667", "-0.333"), "Mo2 S4", 194),
    "four digits": (sulfide("0.3333", "0.6667"), "Mo2 S4", 194),
    "uncertain": (sulfide("0.3331(4)", "0.6664(4)"), "Mo2 S4", 194),
    "zeros behind": (sulfide("0.333000", "0.667000"), "Mo2 S4", 194),
}


@pytest.mark.parametrize("case", ROUNDED)
def test_rounded_coordinates_lie_on_their_special_positions(case):
    text, formula, G = ROUNDED[case]
    assert read_cif(text).composition.formula == formula
    crystals = encode(text)
    assert int(crystals.G[0]) == G
    assert decode(crystals)[0].composition.formula == formula


def test_an_atom_near_a_special_position_is_refused_unless_its_digits_allow_it():
    with pytest.raises(ValueError, match="own image .Na1, 0.24 Angstrom"):
        read_cif(salt(atoms=["Na1 Na 0.0301 0.0002 0.0001"], formula=None))
    # with formula and Z, this is what the file means, and `evaluate` says that atoms overlap
    assert len(read_cif(salt(atoms=["Na1 Na 0.0301 0 0"], formula="Na", Z=24))) == 24


ZIRCONIA = ("Zr1 Zr 0.27 0.04 0.21", "O1 O 0.07 0.33 0.34", "O2 O 0.45 0.76 0.48")
MONOCLINIC = (5.15, 5.21, 5.31, 90, 99.2, 90)
ORTHORHOMBIC = (5.3, 5.5, 7.6, 90, 90, 90)
GENERAL = ("Ca1 Ca 0.11 0.18 0.37",)
BISMUTH = (hexagonal(4.546, 11.862), ("Bi1 Bi 0 0 0.2339",))
BISMUTH_RHOMBOHEDRAL = ((4.746,) * 3 + (57.24,) * 3, ("Bi1 Bi 0.234 0.234 0.234",))
SILICON = ((5.43,) * 3 + (90,) * 3, ("Si1 Si 0 0 0",))
SYMBOLS = [  # symbols, cell and atoms, number of atoms, space group of what is made
    (["F m -3 m", "Fm-3m", "F m 3 m", "f m -3 m", "F 4/m -3 2/m"], (CUBIC, SALT), 8, 225),
    (["P 21/c", "P2_1/c", "P 2(1)/c", "P 1 21/c 1", "P 21/n"], (MONOCLINIC, ZIRCONIA), 12, 14),
    (["C 2/c", "C 1 2/c 1", "I 2/a", "I 1 2/a 1"], (MONOCLINIC, GENERAL), 8, 15),
    (["C m c a", "Cmce", "B b c m", "Bbem"], (ORTHORHOMBIC, GENERAL), 16, 64),
    (["P n m a", "P b n m", "Pnam"], (ORTHORHOMBIC, GENERAL), 8, 62),
    (["F d -3 m :1", "F d -3 m S", "Fd3m:1"], SILICON, 8, 227),
    (["R -3 m", "R-3m", "R -3 m :H", "R -3 m H", "H -3 m"], BISMUTH, 6, 166),
    (["R -3 m", "R -3 m :R", "R -3 m R"], BISMUTH_RHOMBOHEDRAL, 2, 166),
]


@pytest.mark.parametrize(
    ("name", "crystal", "n_atoms", "G"),
    [(name, *rest) for names, *rest in SYMBOLS for name in names],
)
def test_a_symbol_is_enough(name, crystal, n_atoms, G):
    cell, atoms = crystal
    structure = read_cif(cif(cell, symbol(name), atoms))
    assert len(structure) == n_atoms
    assert int(encode(structure).G[0]) == G


@pytest.mark.parametrize(
    "statement",
    [
        "_symmetry_space_group_name_Hall '-F 4 2 3'",
        "_space_group_name_Hall '-F_4_2_3'",
        number(225),
        "_space_group.IT_number 225",
        symbol("my group") + "\n" + number(225),  # a group with a single setting
    ],
)
def test_other_statements_of_symmetry(statement):
    assert read_cif(salt(statement)).composition.formula == "Na4 Cl4"


def test_two_settings_of_a_symbol_are_one_crystal():
    "The same crystal in both origins of a group, given by the symbols alone."
    spinel = {
        1: ["Mg1 Mg 0 0 0", "Al1 Al 0.625 0.625 0.625", "O1 O 0.3875 0.3875 0.3875"],
        2: ["Mg1 Mg 0.125 0.125 0.125", "Al1 Al 0.5 0.5 0.5", "O1 O 0.2625 0.2625 0.2625"],
    }
    cell = (8.08,) * 3 + (90,) * 3
    one, two = [read_cif(cif(cell, symbol(f"F d -3 m :{k}"), v)) for k, v in spinel.items()]
    assert one.composition.formula == two.composition.formula == "Mg8 Al16 O32"
    assert StructureMatcher().fit(one, two)
    # the formula decides where the symbol doesn't
    open_origin = read_cif(cif(cell, symbol("F d -3 m"), spinel[2], "Mg Al2 O4", Z=8))
    assert StructureMatcher().fit(two, open_origin)


FULL = [
    *[f"Na{i} Na {x}" for i, x in enumerate(("0 0 0", "0 .5 .5", ".5 0 .5", ".5 .5 0"))],
    *[f"Cl{i} Cl {x}" for i, x in enumerate((".5 .5 .5", ".5 0 0", "0 .5 0", "0 0 .5"))],
]
PHASE = salt()
JOURNAL = "data_global\n_journal_year 2001\n_cell_length_a ?\n"
PATTERN = "data_pattern\n" + "\n".join(f"_cell_{k} 5" for k in CELL) + "\n_pd_meas_number 9\n"
SPECIES = [
    "Fe1 Fe3+ 0.125 0.125 0.125 1",
    "Fe2 Fe2+ 0.5 0.5 0.5 0.5",
    "Fe3 Fe3+ 0.5 0.5 0.5 0.5",
    "O1 O2- 0.2549 0.2549 0.2549 .",
]
OCCUPANCY = COLUMNS + " occupancy"
LABELS = "label fract_x fract_y fract_z"
MAGNETITE = cif((8.39,) * 3 + (90,) * 3, symbol("F d -3 m :2"), SPECIES, "Fe3 O4", OCCUPANCY)
READ = {  # text, formula of the cell
    "text block first": (JOURNAL + PHASE, "Na4 Cl4"),
    "text block last": (PHASE + "data_refs\n_journal_year 2001\n", "Na4 Cl4"),
    "pattern last": (PHASE + PATTERN, "Na4 Cl4"),
    "CRLF": (PHASE.replace("\n", "\r\n"), "Na4 Cl4"),
    "CR": (PHASE.replace("\n", "\r"), "Na4 Cl4"),
    "byte order mark": ("\ufeff" + PHASE, "Na4 Cl4"),
    "Greek name": (PHASE.replace("data_x", "data_\u03b2"), "Na4 Cl4"),
    "names with a dot": (PHASE.replace("_atom_site_", "_atom_site."), "Na4 Cl4"),
    "uncertain cell": (PHASE.replace("5.64", "5.640(2)"), "Na4 Cl4"),
    "all atoms and operations": (salt(atoms=FULL), "Na4 Cl4"),
    "all atoms, x, y, z and a number": (salt(ALONE + "\n" + number(225), FULL), "Na4 Cl4"),
    "formula and Z decide": (salt(ALONE + "\n" + number(225), Z=4), "Na4 Cl4"),
    "formula of the whole cell": (salt(formula="Na4 Cl4", Z=4), "Na4 Cl4"),
    "a centring forgotten": (
        salt(operations("P m -3 m") + "\n" + number(225), Z=4),
        "Na4 Cl4",
    ),
    "an atom twice": (salt(atoms=[*SALT, "Cl2 Cl 0.5 0.5 0.5"]), "Na4 Cl4"),
    "several ions of an element": (MAGNETITE, "Fe24 O32"),
    "D and H": (
        salt(atoms=["D1 D 0 0 0 .6", "H1 H 0 0 0 .4"], formula=None, columns=OCCUPANCY),
        "H4",
    ),
    "a dummy atom": (
        salt(
            atoms=["Na1 Na 0 0 0 .", "X1 Cl .1 .2 .3 dum"],
            formula=None,
            columns=COLUMNS + " calc_flag",
        ),
        "Na4",
    ),
    "capitals": (salt(atoms=["NA1 NA 0 0 0", "CL1 CL .5 .5 .5"]), "Na4 Cl4"),
    "formula in capitals": (salt(formula="NA CL"), "Na4 Cl4"),
    "label of calcium": (salt(atoms=["CA1 0 0 0"], formula="Ca", columns=LABELS), "Ca4"),
    "label of carbon": (salt(atoms=["CA1 0 0 0"], formula="C", columns=LABELS), "C4"),
    "label O1A": (salt(atoms=["O1A 0 0 0"], formula=None, columns=LABELS), "O4"),
    "magnetic": (
        salt(
            "loop_\n_space_group_symop_magn_operation.xyz\nx,y,z,+1\n-x,-y,-z,-1\n"
            "loop_\n_space_group_symop_magn_centering.xyz\nx,y,z,+1\nx+1/2,y+1/2,z+1/2,-1",
            ["Fe1 Fe 0 0 0"],
            None,
        ),
        "Fe2",
    ),
}


def test_a_number_of_formula_units_out_of_all_proportion_counts_as_none():
    assert read_cif(salt(formula=None, Z="1" * 5000)).composition.formula == "Na4 Cl4"


@pytest.mark.parametrize("case", READ)
def test_odd_files_that_are_right(case):
    text, formula = READ[case]
    structure = read_cif(text)
    assert structure.composition.formula == formula
    assert structure.is_ordered


def one(*atoms, **more):
    "Rock salt's cell with other atoms and no formula."
    return salt(atoms=atoms, formula=None, **more)


REFUSED = {  # text, words of the reason
    "formula": (salt(formula="Na Cl2"), "formula Na Cl2, .* make a cell of Na4 Cl4"),
    "hydrogen": (salt(formula="Na Cl H3", Z=4), "formula Na Cl H3 and Z = 4, .* cell of Na4 Cl4"),
    "Z alone": (salt(formula=None, Z=3), "Z = 3, .* cell of Na4 Cl4"),
    "asymmetric unit alone": (salt(ALONE, Z=4), "formula Na Cl and Z = 4, .* Na1 Cl1"),
    "no symmetry": (salt("", Z=4), "formula Na Cl and Z = 4, .* Na1 Cl1"),
    "another number": (
        salt(ALONE + "\n" + number(225)),
        "x, y, z alone or the space group F m -3 m",
    ),
    "unknown symbol": (salt(symbol("F m -3 q")), "no known space group .F m -3 q."),
    "unknown setting": (
        cif(MONOCLINIC, symbol("P 21/q") + "\n" + number(14), ZIRCONIA, "Zr O2"),
        "P 1 21/c 1 or .* P 1 21/n 1 or .* different crystals",
    ),
    "origin": (cif(SILICON[0], symbol("F d 3 m"), SILICON[1], "Si"), "F d -3 m:1 or .* F d -3 m:2"),
    "number 231": (salt(number(231)), "no known space group .231."),
    "Schoenflies": (salt("_space_group_name_Schoenflies 'O_h^5'"), "no known space group .O_h.5."),
    "system alone": (salt("_symmetry_cell_setting cubic"), "no known space group .cubic."),
    "operations left out": (
        salt("loop_\n_symmetry_equiv_pos_as_xyz\nx,y,z\n-y,x,z"),
        "its 2 make 4",
    ),
    "operation": (salt("loop_\n_symmetry_equiv_pos_as_xyz\nx,y,z\n-x,y,w"), "cannot be read"),
    "hexagonal operations": (
        cif(BISMUTH_RHOMBOHEDRAL[0], operations("R -3 m:H"), BISMUTH[1]),
        "contradicts its symmetry .*57.24.* the 36 operations",
    ),
    "hexagonal symbol": (
        cif(BISMUTH_RHOMBOHEDRAL[0], symbol("R -3 m :H"), BISMUTH[1]),
        "contradicts its symmetry .* the space group R -3 m:H",
    ),
    "another axis": (
        cif((5, 6, 7, 90, 90, 99), symbol("P 21/c"), ZIRCONIA),
        "contradicts its symmetry .* the space group P 1 21/c 1",
    ),
    "two crystals": (PHASE + PHASE.replace("data_x", "data_y"), "2 crystals .data blocks x, y."),
    "no crystal": (JOURNAL, "holds no crystal"),
    "cut": (PHASE[:-4], "line .* Wrong number of values"),
    "atoms in two loops": (
        PHASE + "loop_\n_atom_site_calc_flag\nd\n",
        "table of atoms whose columns differ in length",
    ),
    "cell twice": (PHASE + "_cell_length_a 6\n", "two values for one entry ._cell_length_a."),
    "half-filled": (one("Na1 Na 0 0 0 0.5", columns=OCCUPANCY), "occupancy 0.5 of Na1"),
    "overfilled": (one("Na1 Na 0 0 0 1.001", columns=OCCUPANCY), "occupancy 1.001 of Na1"),
    "refined": (one("Na1 Na 0 0 0 0.98(1)", columns=OCCUPANCY), r"occupancy 0.98\(1\) of Na1"),
    "shared": (
        one("Fe1 Fe 0 0 0 0.5", "Co1 Co 0 0 0 0.5", columns=OCCUPANCY),
        "occupancy 0.5 of Fe1 and 0.5 of Co1",
    ),
    "unknown occupancy": (one("Na1 Na 0 0 0 ?", columns=OCCUPANCY), "occupancy of Na1 is '.'"),
    "overlap": (
        one(*SALT, "Br1 Br .5 .5 .5"),
        "too close to each other .Cl1 and Br1, 0.00 Angstrom.",
    ),
    "unknown place": (one(*SALT, "H1 H ? ? ?"), "no number .coordinate x of H1 is '.'."),
    "decimal comma": (one("Na1 Na 0,5 0 0"), "coordinate x of Na1 is '0,5'"),
    "CA": (one("CA1 0 0 0", columns=LABELS), "CA1 names Ca or C"),
    "mixture": (one("M1 Al/Si 0 0 0"), "Al/Si names no element"),
    "nearly full": (
        one("Fe1 Fe2+ 0 0 0 0.5", "Fe2 Fe3+ 0 0 0 0.4", columns=OCCUPANCY),
        "occupancy 0.5 of Fe1 and 0.4 of Fe2",
    ),
    "water": (one("Wat1 0 0 0", columns=LABELS), "Wat1 names no element"),
    "tetrahedron": (one("T1 0 0 0", columns=LABELS), "T1 names no element"),
    "vacancy": (one("V1 Va 0 0 0"), "Va names no element"),
    "modulated": (PHASE + "_cell_modulation_dimension 1\n", "modulated"),
    "no cell": (PHASE.replace("_cell_length_b 5.64", "_cell_length_b ?"), "_cell_length_b is '.'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_left_open_or_wrong_is_refused_with_its_reason(case):
    text, reason = REFUSED[case]
    with pytest.raises(ValueError, match=f"the CIF text .*{reason}") as caught:
        read_cif(text)
    assert "symprec" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_without_symmetry_and_formula_is_read_with_a_word():
    with pytest.warns(UserWarning, match="says nothing of symmetry"):
        assert len(read_cif(salt("", formula=None))) == 2
    with warnings.catch_warnings(action="error"):
        read_cif(salt("", FULL, "Na4 Cl4", Z=4))


def test_atoms_at_one_place_are_the_reason_and_not_symprec():
    pair = Structure(Lattice.cubic(4), ["Si", "Si"], [[0, 0, 0], [0, 0, 0.001]])
    with pytest.raises(ValueError, match="number 0, Si, and 1, Si, 0.00 Angstrom"):
        encode(pair)


def test_several_ions_of_an_element_on_one_site_are_the_element():
    sites = [{"Fe2+": 0.5, "Fe3+": 0.5}, "O2-"]
    iron_oxide = Structure(Lattice.cubic(4.3), sites, [[0, 0, 0], [0.5, 0.5, 0.5]])
    assert decode(encode(iron_oxide))[0].composition.formula == "Fe1 O1"


def test_overlapping_atoms_of_our_own_files_come_back():
    "`evaluate` must see what was generated, so that it can call it overlapping."
    crystals = encode(salt(symbol("P -1"), ["Na1 Na 0.11 0.2 0.3", "Cl1 Cl 0.6 0.4 0.3"], None))
    near = crystals.x.new_tensor([0.004, 0, 0])
    crystals = type(crystals)(
        crystals.G, crystals.k, crystals.b, crystals.x * 0 + near, crystals.a, crystals.S
    )
    (text,) = to_cif(crystals)
    structure = read_cif(text)
    assert structure.composition == decode(crystals)[0].composition
    assert np.sort(structure.distance_matrix[0])[1] < 0.1
