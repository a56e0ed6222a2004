"Variations of real crystals: what stays, what comes back after an interruption, what is refused."

import pandas as pd
import pytest
import torch
from click.testing import CliRunner

import symmbfn.generation
from symmbfn import decode, encode, vary
from symmbfn.__main__ import main
from symmbfn.data import load_mp20
from symmbfn.reconstruct import snap_to_wyckoff
from symmbfn.structures import to_cif

FEW = dict(steps=4, device="cpu", progress=False)


@pytest.fixture(scope="module")
def crystals():
    "Twelve crystals of MP-20's test set, of twelve space groups."
    test = load_mp20()["test"].crystals
    first = {G: i for i, G in reversed(list(enumerate(test.G.tolist())))}
    return test[torch.tensor(sorted(first.values())[:12])]


def repeated(c, n):
    return c[torch.arange(len(c)).repeat_interleave(n)]


def test_what_is_kept_stays(crystals):
    "Groups and numbers of sites always, each other part if asked for; nothing else is fixed."
    structures = decode(crystals, primitive=True)
    exact, positions = snap_to_wyckoff(repeated(encode(structures), 2))
    for keep in ("positions", "elements", "positions,coordinates", "lattice"):
        made = vary(structures, 2, forget=1, keep=keep, **FEW).crystals
        assert torch.equal(made.G, exact.G) and torch.equal(made.n, exact.n), keep
        assert torch.equal(made.a, exact.a) == ("elements" in keep)
        if "positions" in keep:
            assert torch.equal(snap_to_wyckoff(made)[1], positions)
        if "coordinates" in keep:
            torch.testing.assert_close(made.x, exact.x)
        is_same_lattice = torch.allclose(made.k, exact.k, atol=1e-6)
        assert is_same_lattice == ("lattice" in keep)


def test_elements_are_limited(crystals):
    made = vary(decode(crystals, primitive=True), 1, allow="Li,Na,K,O,S", forbid="S", **FEW)
    found = {str(element) for structure in made.structures for element in structure.composition}
    assert found <= {"Li", "Na", "K", "O"}


def test_elements_are_preferred(crystals):
    "Within what may occur; where elements are kept, nothing can be preferred."
    structures = decode(crystals, primitive=True)
    alkali = dict(allow="Li,Na,K,O,S", forget=1, **FEW)
    made = {
        element: vary(structures, 4, prefer={element: 20}, **alkali).crystals.a
        for element in ("Na", "K")
    }
    sodium, potassium = (((made[e] == 11).sum(), (made[e] == 19).sum()) for e in ("Na", "K"))
    assert sodium[0] > sodium[1] and potassium[1] > potassium[0]
    with pytest.raises(ValueError, match="prefer has Fe, which may not occur"):
        vary(structures, 1, prefer="Fe=2", allow="Li,O", **FEW)
    with pytest.raises(ValueError, match="leave allow, forbid and prefer out"):
        vary(structures, 1, prefer="Na=2", keep="elements", **FEW)


def test_interrupted_and_started_again_it_is_the_same(crystals, tmp_path, monkeypatch):
    "Stopped after its first batch; the batches of the second call are of another size."
    structures = decode(crystals[:4], primitive=True)
    whole = vary(structures, 2, **FEW, out=tmp_path / "whole", batch_size=8)
    sample_batch = symmbfn.generation.sample_batch
    calls = []

    def stop_at_the_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sample_batch(*arguments)

    monkeypatch.setattr(symmbfn.generation, "sample_batch", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        vary(structures, 2, **FEW, out=tmp_path / "stopped", batch_size=2)
    again = vary(structures, 2, **FEW, out=tmp_path / "stopped", batch_size=3)
    assert sum(len(arguments[1].numbers) for arguments in calls) == 2 + 8
    torch.testing.assert_close(again.crystals.x, whole.crystals.x, atol=1e-5, rtol=0)
    pd.testing.assert_frame_equal(again.table, whole.table, atol=1e-3)
    with pytest.raises(ValueError, match="not of this request"):
        vary(structures, 2, **FEW, out=tmp_path / "stopped", seed=1)


def test_command(crystals, tmp_path):
    "One CIF in, three crystals out; a wrong share is refused before a folder is made."
    file = tmp_path / "mine.cif"
    file.write_text(to_cif(crystals[:1])[0])
    words = ["vary", str(file), "--n", "3", "--steps", "4", "--device", "cpu", "--no-progress"]
    done = CliRunner().invoke(main, [*words, "--out", str(tmp_path / "made")])
    assert done.exit_code == 0, done.output
    table = pd.read_parquet(tmp_path / "made" / "samples.parquet")
    assert len(list((tmp_path / "made").glob("*.cif"))) == len(table) == 3
    assert set(table["origin"]) == {"mine"}
    assert table["same_as_origin"].dtype == bool
    done = CliRunner().invoke(main, [*words, "--forget", "2", "--out", str(tmp_path / "none")])
    assert done.exit_code == 2 and "share above 0" in done.output
    assert not (tmp_path / "none").exists()
