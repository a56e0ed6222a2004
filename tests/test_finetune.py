"""Test `finetune`: what is killed goes on, what is frozen stays, old properties stay beside new,
and what cannot work is refused in one sentence."""

import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
from click.testing import CliRunner

import symmbfn
from symmbfn.__main__ import main
from symmbfn.data import Dataset, load_mp20, save_dataset
from symmbfn.finetuning import finetune
from symmbfn.model import BASE, load
from symmbfn.structures import decode
from symmbfn.train import TrainConfig, train

OLD = ["formation_energy_per_atom", "e_above_hull"]
SMALL = BASE | dict(hidden=16, embed=8, layers=1, freqs=2, properties=OLD)
QUICK = dict(batch_size=20, device="cpu", precision="float32", progress=False)

pytestmark = pytest.mark.usefixtures("one_thread")


def run(*words):
    "Run a command in this process. Returns click's Result: exit_code, output, stderr."
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A folder with weights, first.safetensors, and 60 structures with band gaps, gaps.safetensors."
    folder = tmp_path_factory.mktemp("finetune")
    splits = load_mp20()
    data = splits["train"][:60]
    config = TrainConfig(epochs=1, batch_size=20)
    silent = dict(model_settings=SMALL, report=lambda row: None)
    crystals, val = data.crystals, splits["val"][:10].crystals
    train(folder / "first", crystals, val, config, y=data.targets(OLD), **silent)
    (folder / "first" / "model.safetensors").rename(folder / "first.safetensors")
    save_dataset(folder / "gaps.safetensors", only(data, "band_gap"))
    return folder


def only(data, name, values=None):
    "A data set with one property, whose values may be others."
    return Dataset(
        data.crystals, data.ids, {name: data.properties[name] if values is None else values}
    )


def weights(path):
    "The tensors of a model."
    return load(path).model.state_dict()


def same(a, b):
    "Whether two models have the same tensors, bit for bit."
    return a.keys() == b.keys() and all(v.equal(b[name]) for name, v in a.items())


def words_for(folder, out, *more):
    "The words of a fine-tuning of the small weights on a CPU."
    words = ["finetune", folder / "gaps.safetensors", "--properties", "band_gap", "--out", out]
    words += ["--model", folder / "first.safetensors", "--batch-size", 20, "--device", "cpu"]
    return [str(word) for word in (*words, "--precision", "float32", *more)]


def test_killed_and_started_again_it_gives_the_same_weights(folder, tmp_path):
    "Killed by -9 as soon as it has saved, and stopped after an epoch; then the same comes out."
    settings = ("--epochs", 6, "--patience", 6)
    whole = run(*words_for(folder, tmp_path / "whole", *settings))
    assert whole.exit_code == 0, whole.output
    assert whole.output.count("min left") == 6 and "asked for" in whole.output
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "symmbfn", *words_for(folder, out, *settings)]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **quiet)
    while not (out / "checkpoint.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    stopped = run(*words_for(folder, out, *settings, "--max-minutes", 0))
    assert stopped.exit_code == 0, stopped.output
    done = run(*words_for(folder, out, *settings))
    assert done.exit_code == 0, done.output
    made = [weights(path / "model.safetensors") for path in (out, tmp_path / "whole")]
    assert same(*made)
    logs = [
        pd.read_csv(path / "log.csv").drop(columns="seconds") for path in (out, tmp_path / "whole")
    ]
    assert logs[0].equals(logs[1]) and len(logs[0]) == 6
    other = run(*words_for(folder, out, "--epochs", 7))
    assert other.exit_code == 2 and "not of this request" in other.stderr


def test_frozen_only_the_encoding_changes(folder, tmp_path):
    done = run(*words_for(folder, tmp_path / "out", "--epochs", 3, "--frozen"))
    assert done.exit_code == 0, done.output
    before, after = (
        weights(folder / "first.safetensors"),
        weights(tmp_path / "out" / "model.safetensors"),
    )
    changed = {name for name, v in before.items() if not v.equal(after[name])}
    assert changed == {"y_mean", "y_std", "net.f_y.weight", "net.f_y.bias"}
    columns = before["net.f_y.weight"].shape[1]
    assert after["net.f_y.weight"][:, :columns].equal(before["net.f_y.weight"])
    assert after["net.f_y.weight"][:, columns:].abs().max() > 0
    for name in ("y_mean", "y_std"):
        assert after[name][:2].equal(before[name])


@pytest.fixture(scope="module")
def tuned(folder):
    "What a fine-tuning of all weights returns."
    model = folder / "first.safetensors"
    out = folder / "tuned"
    return finetune(
        folder / "gaps.safetensors", "band_gap", model=model, epochs=3, out=out, **QUICK
    )


def test_the_best_epoch_is_left(tuned, folder):
    losses = [row["val_loss"] for row in tuned.meta["curve"]]
    read = load(folder / "tuned" / "model.safetensors")
    assert read.meta["val_loss"] == min(losses) == losses[read.meta["epoch"] - 1]
    assert same(read.model.state_dict(), tuned.model.state_dict())


def test_old_and_new_properties_can_be_asked_for(tuned, folder):
    assert tuned.model.settings["properties"] == [*OLD, "band_gap"]
    model = folder / "tuned" / "model.safetensors"
    few = dict(steps=2, progress=False)
    for condition in ("stable", dict(band_gap=3), dict(band_gap=3, e_above_hull=0)):
        made = symmbfn.generate(2, condition=condition, model=model, **few)
        assert len(made.structures) == 2
    made = symmbfn.generate(2, condition=dict(band_gap=3), model=tuned, **few)
    assert "asked_band_gap" in made.table


def test_patience_ends_a_run(folder, monkeypatch):
    "The losses of the held-out structures are chosen beforehand, and all above that before."
    losses = iter((95.0, 93.0, 94.0, 96.0))
    names = ("loss", "k", "x", "a", "S")
    monkeypatch.setattr("symmbfn.train.validate", lambda *_: dict.fromkeys(names, next(losses)))
    options = dict(model=folder / "first.safetensors", patience=2, epochs=30) | QUICK
    with pytest.warns(UserWarning, match="no better than those they began with"):
        made = finetune(folder / "gaps.safetensors", "band_gap", **options)
    assert [row["val_loss"] for row in made.meta["curve"]] == [95, 93, 94, 96]
    assert (made.meta["epoch"], made.meta["val_loss"]) == (2, 93)


def test_structures_without_a_column_can_be_learnt_and_weights_without_properties_too(folder):
    data = load_mp20()["train"][:40]
    plain = Dataset(data.crystals, data.ids)
    made = finetune(plain, model=folder / "first.safetensors", epochs=1, **QUICK)
    assert made.model.settings["properties"] == OLD
    crystals = data.crystals
    nothing = SMALL | dict(properties=[])
    config = TrainConfig(epochs=1, batch_size=20)
    silent = dict(model_settings=nothing, report=lambda row: None)
    train(folder / "nothing", crystals, crystals, config, **silent)
    options = dict(model=folder / "nothing" / "model.safetensors", epochs=1) | QUICK
    assert finetune(plain, **options).model.settings["properties"] == []
    made = finetune(data, "band_gap", **options)
    assert made.model.settings["properties"] == ["band_gap"]
    with pytest.raises(ValueError, match="these know none"):
        finetune(data, "band_gap", frozen=True, **options)


def test_the_packaged_weights_can_be_tuned():
    splits = load_mp20()
    some = dict(source=splits["train"][:40], val=splits["val"][:10])
    made = finetune(**some, properties="band_gap", frozen=True, epochs=1, **QUICK)
    assert made.model.settings["properties"] == [*OLD, "band_gap"]


def write_table(path, structures, **columns):
    "Write a table of structures with further columns."
    columns["cif"] = [structure.to(fmt="cif") for structure in structures]
    pd.DataFrame(columns).to_csv(path, index=False)


@pytest.mark.parametrize(
    "column, said",
    [
        ("phase", "'cubic' is not a number"),
        ("constant", "is 1 in every structure"),
        ("sparse", "has a value in 3 of 24 structures, but 20"),
        ("gap", "Unknown property gap: the data has constant, energy, sparse"),
    ],
)
def test_a_bad_column_is_refused_in_one_sentence(folder, tmp_path, column, said):
    table = tmp_path / "mine.csv"
    structures = decode(load_mp20()["train"].crystals[:24])
    columns = dict(energy=range(24), phase=["cubic"] * 24, constant=1.0)
    write_table(table, structures, **columns, sparse=[1.0, 2.0, 3.0] + [None] * 21)
    done = run("finetune", table, "--properties", column, "--out", tmp_path / "out", "--workers", 1)
    assert done.exit_code == 2, done.output
    assert said in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_too_few_and_too_large_structures_are_refused(folder, tmp_path):
    data = load_mp20()["train"]
    first = dict(model=folder / "first.safetensors", out=tmp_path / "out") | QUICK
    with pytest.raises(ValueError, match="structures to learn from: give 20"):
        finetune(data[:19], "band_gap", **first)
    trained = load(folder / "first.safetensors")
    narrow = trained._replace(prior=trained.prior._replace(max_atoms=torch.tensor(4)))
    warned = pytest.warns(UserWarning, match="more atoms in the primitive cell than 4")
    with warned, pytest.raises(ValueError, match="structures to learn from: give 20"):
        finetune(data[:40], "band_gap", **first | dict(model=narrow))
    unknown = only(data[:10], "band_gap", torch.full((10,), torch.nan))
    with pytest.raises(ValueError, match="held out has a value of band_gap"):
        finetune(data[:40], "band_gap", val=unknown, **first)
    assert not (tmp_path / "out").exists()
