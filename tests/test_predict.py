"""Test `predict` and the measures: what is killed goes on, lists are what they say.

Copper and gold with EMT, a potential of ASE that takes no time."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import islice

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from pymatgen.analysis.structure_matcher import StructureMatcher

from symmbfn.__main__ import main
from symmbfn.data import load_mp20
from symmbfn.model import load
from symmbfn.prediction import (
    constraints_of,
    match_rate,
    metre,
    mp20_templates,
    parse_target,
    predict,
    rms_distances,
    rmse,
    sample_candidates,
    skeletons_of,
    take_turns,
    weigh_skeletons,
)
from symmbfn.structures import decode

QUESTION = dict(composition="CuAu", n=3, potential="ase.calculators.emt:EMT", steps=3)
QUESTION |= dict(formula_units=1)
WORDS = "predict --composition CuAu --n 3 --potential ase.calculators.emt:EMT --steps 3"
WORDS = f"{WORDS} --formula-units 1 --workers 1 --no-progress".split()
LOOK = dict(workers=1, progress=False)

pytestmark = pytest.mark.usefixtures("one_thread")


def run(*words):
    "Run a command in this process. Returns click's Result: exit_code, output, stderr."
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "The folder of a prediction that nothing interrupted, and what it found."
    folder = tmp_path_factory.mktemp("whole") / "predicted"
    return folder, predict(**QUESTION, **LOOK, out=folder)


def test_killed_and_started_again_it_loses_and_repeats_nothing(whole, tmp_path):
    "Killed by -9 as soon as its first block is there; then the same list comes out."
    out = tmp_path / "predicted"
    command = [sys.executable, "-m", "symmbfn", *WORDS, "--out", out]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **quiet)
    while not list(out.glob("blocks/*.json")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = {path: path.read_bytes() for path in (out / "blocks").glob("*.json")}
    times = {path: path.stat().st_mtime_ns for path in there}
    done = run(*WORDS, "--out", out)
    assert done.exit_code == 0, done.output
    assert all(path.read_bytes() == content for path, content in there.items())
    assert all(path.stat().st_mtime_ns == when for path, when in times.items())
    for name in ("ranking.csv", "crystals/samples.csv"):
        assert (out / name).read_bytes() == (whole[0] / name).read_bytes(), name
    with pytest.raises(ValueError, match="not of this request"):
        predict(**QUESTION | dict(composition="Cu3Au"), **LOOK, out=out)


def test_the_list_is_ranked_and_different_and_counts_add_up(whole):
    folder, found = whole
    table = pd.read_parquet(folder / "ranking.parquet")
    assert table["rank"].tolist() == list(range(1, len(table) + 1))
    assert table["energy"].is_monotonic_increasing
    fit = StructureMatcher().fit
    for i, structure in enumerate(found.structures):
        assert structure.composition.reduced_formula == "CuAu"
        assert not any(fit(structure, other) for other in found.structures[:i])
    rows = []
    for path in sorted((folder / "blocks").glob("*.json")):
        rows += json.loads(path.read_text())["rows"]
    assert table["count"].sum() <= sum(row["fate"] in (None, "copy") for row in rows)
    assert len(list((folder / "crystals").glob("*.cif"))) == len(table)


def test_the_same_candidates_can_be_ranked_by_likelihood(whole):
    folder, found = whole
    before = {path: path.stat().st_mtime_ns for path in (folder / "blocks").glob("*.json")}
    ranked = predict(**QUESTION | dict(rank="likelihood"), **LOOK, out=folder)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert ranked.table["surprisal"].is_monotonic_increasing
    assert set(found.table["crystal"]) <= set(ranked.table["crystal"])


def test_what_is_sampled_has_the_skeletons_that_take_turns():
    trained = load()
    target = parse_target("MgAl2O4", 2, trained.prior)
    weights = weigh_skeletons(mp20_templates(), target.cells(20))
    turns = list(islice(take_turns(weights), 3))
    made = sample_candidates(trained, [target], 3, steps=3, repair_rounds=0)
    assert skeletons_of(made) == turns
    assert all(skeleton.atoms() == {8: 8, 12: 2, 13: 4} for skeleton in turns)
    assert constraints_of(turns).G.tolist() == made.G.tolist()


def test_the_truth_matches_itself_and_measures_count():
    crystals = load_mp20()["test"].crystals[:4]
    truths = decode(crystals, primitive=True)
    supercells = [structure * [2, 1, 1] for structure in truths]
    distances = rms_distances(truths, [[s] for s in supercells])
    assert match_rate(distances) == 1 and rmse(distances) < 1e-4
    strangers = [[s] for s in truths[1:] + truths[:1]]
    distances = rms_distances(truths, strangers)
    formulas = {structure.composition.reduced_formula for structure in truths}
    assert len(formulas) == 4 and match_rate(distances) == 0 and np.isnan(rmse(distances))
    assert metre(truths, strangers, distances) == 0
