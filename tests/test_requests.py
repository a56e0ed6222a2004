"Test what a request means, however it is said, and that plans are right, whole and fast."

import math
import multiprocessing
import os
import subprocess
import sys
import time
import warnings
from collections import Counter
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from pymatgen.core import Composition, Element, Lattice, Species, Structure
from pymatgen.io.vasp import Poscar

import symmbfn
from symmbfn.condition import Placements, Request, sample_constraints
from symmbfn.data import condition_prior, count_sequences, load_mp20
from symmbfn.generation import parse_request, plan_crystals
from symmbfn.train import TrainConfig
from symmbfn.wyckoff import wyckoff_table

QUICK = dict(steps=2, progress=False)


@pytest.fixture(scope="module")
def prior():
    return symmbfn.load().prior


def plan(prior, n=4, **words):
    "Plan n crystals. Returns Constraints, the seconds of CPU time that it took, and the warnings."
    request = parse_request(**words)
    began = time.process_time()
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        c = sample_constraints(request, prior, n)
    return c, time.process_time() - began, [str(note.message) for note in notes]


@pytest.mark.parametrize(
    "composition, right",
    [
        (Composition({"Fe2+": 1, "Fe3+": 2, "O2-": 4}), {26: 3, 8: 4}),
        ({"Fe2+": 1, "Fe3+": 2, "O2-": 4}, {26: 3, 8: 4}),
        (Composition({"Fe": 1, "Fe3+": 2, "O": 4}), {26: 3, 8: 4}),
        (Composition({"Mn3+": 0.5, "Mn4+": 0.5, "O2-": 2}), {25: 1, 8: 2}),
        ("HDO", {1: 2, 8: 1}),
        ({"T": 1, "D": 1, "H": 2, "O": 2}, {1: 4, 8: 2}),
        ("TiO₂", {22: 1, 8: 2}),
        (" Ca5(PO4)3OH ", {20: 5, 15: 3, 8: 13, 1: 1}),
    ],
    ids=str,
)
def test_species_of_an_element_add_up(composition, right):
    assert parse_request(composition=composition).formula == right


@pytest.mark.parametrize(
    "elements",
    [
        {"O", "Li"},
        ("Li", "O"),
        np.array(["O", "Li"]),
        pd.Series([3, 8]),
        "li,o",
        "Li-O",
        "O Li",
        "Li;O",
        "Li+-O2-",
        [Element("Li"), Species("O", -2)],
        Composition("Li2O"),
        frozenset({3, 8}),
    ],
    # not str alone: sets of text are written in another order by each process
    ids=lambda elements: (
        f"{type(elements).__name__} {'' if isinstance(elements, set) else elements}"
    ),
)
def test_elements_in_any_container(elements):
    assert parse_request(elements=elements).elements == (3, 8)
    assert parse_request(require=elements).required == (3, 8)
    assert not {3, 8} & set(parse_request(forbid=elements).elements)


def test_preferences_as_text_or_as_a_dict():
    right = {11: 2.0, 19: 0.5}
    for prefer in (
        "Na=2,K=0.5",
        "na = 2, K=5e-1",
        {"Na": 2, "K": 0.5},
        {Element("Na"): 2, 19: 0.5},
    ):
        assert parse_request(prefer=prefer).prefer == right
    assert parse_request(prefer=pd.Series({"Na": 2, "K": 0.5})).prefer == right


@pytest.mark.parametrize(
    "request_, words",
    [
        (dict(prefer={"Na": 0}), "factor of Na is 0: give a positive number"),
        (dict(prefer={"Na": float("inf")}), "factor of Na is inf"),
        (dict(prefer={"Na": float("nan")}), "factor of Na is nan"),
        (dict(prefer={"Na": "2"}), "factor of Na is '2'"),
        (dict(prefer="Na"), "prefer has 'Na': give symbols and factors"),
        (dict(prefer="Na=much"), "prefer has 'Na=much'"),
        (dict(prefer="Xx=2"), "'Xx' is unknown"),
        (dict(prefer="H=2,D=3"), "prefer has H twice"),
        (dict(prefer=2), "prefer is 2: give"),
        (dict(prefer=["Na"]), "prefer is .*: give"),
        (dict(prefer=""), "prefer is empty"),
        (dict(prefer="Na=2", forbid="Na"), "prefer has Na, which may not occur"),
        (dict(prefer="Na=2", elements="Li,O"), "prefer has Na, which may not occur"),
        (dict(prefer="Ti=2", composition="TiO2"), "every site is given: leave prefer out"),
    ],
    ids=str,
)
def test_preferences_that_make_no_sense(request_, words):
    with pytest.raises(ValueError, match=words):
        parse_request(**request_)


@pytest.mark.parametrize(
    "space_group, right",
    [
        ("Fm3m", {225}),
        ("F m -3 m", {225}),
        ("FM-3M", {225}),
        ("P21/n", {14}),
        ("P 2_1/n", {14}),
        ("R-3m:R", {166}),
        ("R-3mH", {166}),
        ("Fd-3m:1", {227}),
        ("Fd-3m Z", {227}),
        ("I4_1/amd:2", {141}),
        ("Bbcm", {64}),
        ("Ia3d", {230}),
        ("221-230", set(range(221, 231))),
        ("Pnma, 195 - 197", {62, 195, 196, 197}),
        (range(1, 4), {1, 2, 3}),
        pytest.param({225, "Pnma"}, {62, 225}, id="a set of both"),
        (np.array([225, 62]), {62, 225}),
        (np.int64(225), {225}),
        (pd.Series([225.0, 62.0]), {62, 225}),
        (["tetragonal", "1-2"], {1, 2, *range(75, 143)}),
    ],
    ids=str,
)
def test_groups_as_people_write_them(space_group, right):
    assert parse_request(space_group=space_group).groups == tuple(sorted(right))


@pytest.mark.parametrize("name", ["space_group", "elements", "require", "forbid", "composition"])
@pytest.mark.parametrize("empty", ["", " ", [], (), set(), {}], ids=repr)
def test_what_is_empty_does_not_mean_anything(name, empty):
    with pytest.raises(ValueError, match=f"{name} is empty"):
        parse_request(**{name: empty})


@pytest.mark.parametrize("elements", ["Xx", "CO", "LiO", "O2", "Li2O", "Cm", 0, 95, True, None])
def test_what_is_no_element_is_refused(elements):
    with pytest.raises(ValueError, match="unknown"):
        parse_request(elements=[elements])


@pytest.mark.parametrize(
    "space_group", ["Fm3x", "0", 231, "225-231", "9-3", "2.5", True, None, "-"]
)
def test_what_is_no_group_is_refused(space_group):
    with pytest.raises(ValueError, match="unknown"):
        parse_request(space_group=[space_group])


@pytest.mark.parametrize(
    "composition, space_group, atoms",
    [
        ("LiFePO4", "Pnma", 28),
        ("Mg2SiO4", "Pnma", 28),
        ("BaSO4", "Pnma", 24),
        ("Y3Al5O12", "Ia-3d", 80),
        ("Ca5(PO4)3OH", "P6_3/m", 44),
        ("Li7La3Zr2O12", "Ia-3d", 96),
        ("Mg3Al2Si3O12", "Ia-3d", 80),
        ("KH2PO4", "I-42d", 16),
    ],
)
def test_known_crystals_are_planned_in_the_smallest_cells(prior, composition, space_group, atoms):
    c, seconds, notes = plan(prior, composition=composition, space_group=space_group)
    assert seconds < 2
    assert any(f"have {atoms} atoms" in note for note in notes) == (atoms > 20)


@pytest.mark.parametrize(
    "words",
    [
        dict(composition="LiFePO4", formula_units=20),
        dict(composition="Zn4C24H12O13"),
        dict(composition="C60", formula_units=4),
        dict(composition="LiCoNiMnFeCuZnO8"),
        dict(composition="LiFePO4", n_sites=60),
        dict(n_atoms=500),
    ],
    ids=str,
)
def test_plans_are_fast(prior, words):
    assert plan(prior, **words)[1] < 6  # a second on a free machine


@pytest.mark.parametrize(
    "words, reason",
    [
        (dict(composition="LiFePO4", space_group=62, formula_units=2), "4 formula units fit"),
        (dict(composition="LiFePO4", space_group=62, n_sites=2), "5, 6, 7 are possible"),
        (dict(composition="LiFePO4", n_atoms=10), "10 atoms are no whole number"),
        (dict(composition="LiFePO4", n_atoms=14, formula_units=1), "have 7 atoms, not 14"),
        (dict(composition="C997O991"), "would have 1988 atoms"),
        (dict(composition="TiO2", n_sites=500), "500 sites are asked for"),
        (dict(composition="TiO2", n_sites=1), "another number of sites"),
        (dict(n_atoms=2, require="Li,Na,K"), "3 more elements must occur"),
        (dict(elements="Li,O,S", n_sites=2), "number of sites"),
    ],
    ids=str,
)
def test_the_reason_of_a_refusal_is_the_true_one(prior, words, reason):
    with pytest.raises(ValueError, match=reason):
        plan(prior, **words)


def number_of_ways(placements, state):
    "Follow every branch to its end."
    if not state.need:
        return 1
    return sum(number_of_ways(placements, after) for *_, after in placements.branches(state))


def test_no_way_is_lost(prior):
    """Place 16 atoms of each of three elements in group 47, which has eight fixed positions.

    The fixed positions have the multiplicity 1, and the others, which can hold any number of
    sites, 2, 4 and 8."""
    cell = {3: 16, 8: 16, 9: 16}
    placements = Placements(Request(formula=cell), 47, [cell], prior)
    free_sums = Counter()  # atoms -> ways to place them on positions that are not fixed
    for twos, fours, eights in product(range(9), range(5), range(3)):
        free_sums[2 * twos + 4 * fours + 8 * eights] += 1
    expected = 0
    for on_fixed in product(range(9), repeat=3):
        if sum(on_fixed) <= 8:
            expected += math.prod(free_sums[16 - atoms] for atoms in on_fixed)
    assert expected > 2000
    assert number_of_ways(placements, placements.starts[0]) == expected


def test_other_settings_are_groups_but_not_axes():
    assert parse_request(space_group="Pbnm", composition="CaTiO3").groups == (62,)
    assert parse_request(space_group="Pnma", lattice=(5, 6, 7, 90, 90, 90)).groups == (62,)
    for words in (
        dict(space_group="Pbnm", lattice=(5, 6, 7, 90, 90, 90)),
        dict(space_group="P21/n", lattice=(5, 6, 7, 90, 99, 90)),
        dict(space_group="Fd-3m:1", sites=[("C", "8a", (0, 0, 0))]),
    ):
        with pytest.raises(ValueError, match="not the standard setting"):
            parse_request(**words)


def test_more_sites_than_in_the_data_are_told(prior):
    assert any("40 sites or more" in note for note in plan(prior, n_sites=40)[2])
    assert not plan(prior, n_sites=20)[2]


def test_open_sites_of_a_large_template_are_planned_fast(prior):
    sites = [(None, "8d", None)] * 40
    words = dict(space_group=62, sites=sites, composition="Li10Fe10P10O50", formula_units=4)
    c, seconds, _ = plan(prior, n=2, **words)
    assert seconds < 5
    assert torch.bincount(c.b).tolist() == [40, 40]


@pytest.mark.parametrize("number", [np.int64(3), np.float32(3), 3.0, torch.tensor(3)], ids=repr)
def test_numbers_of_other_libraries(number, tmp_path):
    plain = symmbfn.generate(3, seed=3, n_sites=3, out=tmp_path / "a", **QUICK)
    other = symmbfn.generate(number, seed=number, n_sites=number, out=tmp_path / "a", **QUICK)
    assert other.crystals.a.equal(plain.crystals.a)
    assert TrainConfig(epochs=number, seed=number, batch_size=number) == TrainConfig(
        epochs=3, seed=3, batch_size=3
    )


@pytest.mark.parametrize(
    "wrong",
    [
        dict(n=2.5),
        dict(n="2"),
        dict(n=None),
        dict(n=True),
        dict(seed=-1),
        dict(seed=0.5),
        dict(steps=np.nan),
        dict(temperature="hot"),
        dict(temperature=np.inf),
        dict(guidance=None),
        dict(batch_size=-1),
        dict(batch_size="few"),
        dict(device="cuda:99"),
        dict(device="mps"),
        dict(precision="float16"),
        dict(condition={"formation_energy_per_atom": "-2eV"}),
        dict(condition=["formation_energy_per_atom"]),
        dict(lattice=5),
        dict(lattice=(5, 5, 5, 90, 90, np.nan)),
        dict(sites=[("Li", None, (0, 0, np.inf))]),
        dict(sites=5),
        dict(out=""),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused_first(wrong, monkeypatch):
    def sample_batch(*args):
        raise AssertionError("This was sampled.")

    monkeypatch.setattr("symmbfn.generation.sample_batch", sample_batch)
    name = next(iter(wrong)).removesuffix("s")
    said = "formation_energy_per_atom" if name == "condition" else name
    with pytest.raises(ValueError, match=said):
        symmbfn.generate(**dict(n=1) | QUICK | wrong)


def test_a_set_means_the_same_in_every_process(tmp_path):
    code = "import symmbfn; print(list(symmbfn.generate(2, elements={'Li', 'O', 'Fe'}, steps=2,"
    code += f" out={str(tmp_path / 'set')!r}, progress=False).table.formula))"
    said = set()
    for seed in "12":
        environment = os.environ | {"PYTHONHASHSEED": seed}
        command = [sys.executable, "-W", "ignore", "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        said.add(done.stdout)
    assert len(said) == 1


def test_poscar_has_each_element_once(tmp_path):
    symmbfn.generate(4, elements="Li,Fe,O", space_group=[5, 31], out=tmp_path / "out", **QUICK)
    for path in (tmp_path / "out").glob("*.vasp"):
        poscar = Poscar.from_file(path)
        assert len(poscar.site_symbols) == len(set(poscar.site_symbols)) == 3
        cif = Structure.from_file(path.with_suffix(".cif"))
        assert cif.composition.reduced_formula == poscar.structure.composition.reduced_formula


def test_a_lattice_of_numpy_numbers():
    lattice = np.array([5, 5, 5, 90, 90, 90], dtype=np.float32)
    same = parse_request(lattice=Lattice.cubic(5))
    assert parse_request(lattice=lattice).groups == same.groups


def formulas(queue):
    queue.put(list(symmbfn.generate(3, seed=1, **QUICK).table.formula))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork.")
def test_a_forked_child_generates_after_its_parent():
    "With more than one thread in the parent, the child would wait forever."
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        plain = list(symmbfn.generate(3, seed=1, **QUICK).table.formula)
        matrix = torch.ones(1500, 1500)
        (matrix @ matrix).exp()  # starts the threads
        fork = multiprocessing.get_context("fork")
        queue = fork.Queue()
        child = fork.Process(target=formulas, args=(queue,))
        child.start()
        try:
            assert queue.get(timeout=60) == plain
        finally:
            child.kill()
    finally:
        torch.set_num_threads(threads)


def test_a_template_is_one_crystal_and_a_structure_has_a_composition():
    salt = Structure.from_spacegroup(
        "Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0] * 3, [0.5] * 3]
    )
    with pytest.raises(ValueError, match="2 crystals"):
        parse_request(template=[salt, salt])
    assert parse_request(composition=salt).formula == {11: 4, 17: 4}


def positions(c):
    "Letters of each crystal, as a word, and 'free' for sites that may have several positions."
    letters = c.positions.int().argmax(1).tolist()
    known = (c.positions.sum(1) == 1).tolist()
    words = [chr(ord("a") + letter) if k else "free" for letter, k in zip(letters, known)]
    return [[v for v, crystal in zip(words, c.b.tolist()) if crystal == i] for i in range(len(c))]


def test_open_positions_are_those_of_known_crystals(prior):
    "Spinel: whatever is left open of 8a 16d 32e is one of the few ways that crystals have."
    c, _, _ = plan(prior, 100, space_group=227, n_sites=3)
    known = count_sequences(prior, 227)[3]
    names = {"".join(chr(ord("a") + letter) for letter in sequence) for sequence in known}
    assert {"".join(sorted(v)) for v in positions(c)} <= names

    c, _, _ = plan(prior, 100, space_group=227, sites=[(None, "8a", None)], n_sites=3)
    assert all(v[0] == "a" for v in positions(c))
    assert {"".join(sorted(v)) for v in positions(c)} <= names

    c, _, _ = plan(prior, 100, space_group=227, composition="MgAl2O4", formula_units=2)
    table = wyckoff_table()
    for i, letters in enumerate(positions(c)):
        atoms = sum(int(table.mult[table.first[227] + ord(v) - ord("a")]) for v in letters)
        assert atoms == 56, (i, letters)
        assert (
            tuple(ord(v) - ord("a") for v in sorted(letters))
            in count_sequences(prior, 227)[len(letters)]
        )


def test_positions_are_free_where_no_crystal_shows_them(prior):
    "So it is with a given element, a sequence that is new, and weights without sequences."
    c, _, _ = plan(prior, 20, space_group=227, sites=[("Mg", None, None)], n_sites=3)
    assert not (c.positions.sum(1) == 1).any()
    c, _, _ = plan(prior, 20, space_group=227, sites=[("Mg", "8a", None)], n_sites=3)
    assert all(v == ["a", "free", "free"] for v in positions(c))
    new = [(None, "8a", None), (None, "8b", None), (None, "16c", None), (None, "16d", None)]
    c, _, _ = plan(prior, 20, space_group=227, sites=new, n_sites=5)
    assert all(v == ["a", "b", "c", "d", "free"] for v in positions(c))
    older = prior._replace(letters=prior.letters[:0])
    c, _, _ = plan(older, 20, space_group=227, n_sites=3)
    assert c.positions.all()


MENDELEEV = [Element.from_Z(Z).mendeleev_no for Z in range(1, 95)]
PLACE = {
    Element.from_Z(Z): sorted(MENDELEEV).index(number) for Z, number in enumerate(MENDELEEV, 1)
}


def distance_of_elements(of_crystal, allowed, required):
    "How far the elements of a crystal are from those asked for, on the chemical scale; a loop."

    def apart(element, others):
        return min(abs(PLACE[element] - PLACE[other]) for other in others)

    there = sum(apart(e, allowed) for e in of_crystal) / len(of_crystal)
    back = sum(apart(r, of_crystal) for r in required) / len(required) if required else 0
    return there + back


@pytest.mark.parametrize(
    "words",
    [
        dict(elements="Li,P,S"),
        dict(require="O", forbid="Pb"),
        dict(composition="SrTiO3"),
        dict(forbid="U,Pu,Np"),
    ],
    ids=str,
)
def test_examples_count_by_the_likeness_of_their_elements(prior, words):
    "Ratios of weights, since what is spread evenly depends on the data as a whole."
    request = parse_request(**words)
    allowed = {Element.from_Z(Z) for Z in request.formula or request.elements}
    required = {Element.from_Z(Z) for Z in request.formula or request.required}
    masks = [
        torch.tensor([Element.from_Z(Z) in some for Z in range(1, 95)])
        for some in (allowed, required)
    ]
    weights = condition_prior(prior, None, *masks).weights
    assert not weights[prior.n_data :].any()
    known = load_mp20()["train"].crystals[:2000]
    found, expected, others = [], [], []
    for weight, numbers in zip(weights.tolist(), known.a.split(known.n.tolist())):
        elements = {Element.from_Z(Z) for Z in numbers.tolist()}
        if len(required) <= len(elements) <= len(allowed):
            found.append(weight)
            expected.append(math.exp(-distance_of_elements(elements, allowed, required)))
        else:
            others.append(weight)
    rest = np.array(found) - np.array(expected)  # what is spread evenly
    assert rest.max() - rest.min() < 1e-5 and rest.min() > 0
    assert all(0 < weight < min(found) for weight in others)


def test_a_property_does_not_silence_the_elements(prior):
    "Crystals of just the elements asked for count, though the property of others is nearer."
    words = torch.zeros(94, dtype=torch.bool)
    words[[22 - 1, 8 - 1]] = True  # titanium and oxygen
    asked = torch.tensor([torch.nan, -0.05])  # eV/atom above the hull
    by_elements, by_both = (
        condition_prior(prior, y, words, words).weights[: prior.n_data].numpy()
        for y in (None, asked)
    )
    alike = by_elements - by_elements.min()  # the least is what all of the data have
    known = load_mp20()["train"]
    distance = np.abs(known.properties["e_above_hull"].numpy() - -0.05)
    distance[(alike == 0) | np.isnan(distance)] = np.inf
    is_near = distance <= np.sort(distance)[299]
    expected = alike * is_near + 4 * alike / alike.sum()
    np.testing.assert_allclose(by_both - by_both.min(), expected, atol=1e-9)
    numbers = known.crystals.a.split(known.crystals.n.tolist())
    is_titania = np.array([set(v.tolist()) == {22, 8} for v in numbers])
    assert is_titania.sum() == 15 and not (is_titania & is_near).any()
    assert expected[is_titania].sum() > 0.2 * expected.sum()


@pytest.mark.parametrize(
    "composition, G, letters",
    [
        ("MgAl2O4", 227, ("ade", "bce")),
        ("SrTiO3", 221, ("abc", "abd")),
        ("NaCl", 225, ("ab",)),
        ("TiO2", 136, ("af", "bf")),
        ("Cs2NaYCl6", 225, ("abce",)),
        ("ZnO", 186, ("bb",)),
    ],
)
def test_a_composition_is_planned_as_crystals_of_like_elements_are(composition, G, letters):
    "The structure that a compound is known for is among the five plans that are most frequent."
    plans = plan_crystals(symmbfn.load(), parse_request(composition=composition), {}, 300, 0)
    c = plans["constraints"]
    assert (c.positions.sum(1) == 1).all()
    counts = Counter(zip(c.G.tolist(), ("".join(sorted(v)) for v in positions(c))))
    frequent = [kind for kind, _ in counts.most_common(5)]
    assert any((G, word) in frequent for word in letters), counts.most_common(8)


def test_more_elements_can_be_asked_for_than_a_crystal_of_the_data_has(prior):
    "No crystal of the training set has eight elements, but some that the model made have."
    request = parse_request(require="Li,Na,K,Mg,Ca,Al,O,F")
    plans = plan_crystals(symmbfn.load(), request, {"e_above_hull": -0.05}, 5, 0)
    assert (torch.bincount(plans["constraints"].b) >= 8).all()
