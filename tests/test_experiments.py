"The experiments as papermill runs them: parameters are obeyed or refused."

import csv
from pathlib import Path

import papermill
import pytest

root = Path(__file__).parent.parent


@pytest.fixture
def run(tmp_path, monkeypatch):
    "Execute an experiment with parameters, from an empty folder; returns the run's folder."
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.chdir(tmp_path)

    def execute(name, **parameters):
        papermill.execute_notebook(
            root / "nbs" / f"{name}.ipynb",
            tmp_path / f"{name}.ipynb",
            parameters=parameters,
            progress_bar=False,
        )
        return tmp_path / "run"

    return execute


SMALL = dict(
    run="run",
    limit=60,
    hidden=16,
    embed=8,
    layers=1,
    freqs=2,
    samples=4,
    steps=3,
    every=1,
    check=6,
    check_every=2,
)


def test_train_then_sample(run):
    folder = run("20_train", epochs=2, **SMALL)
    log = list(csv.DictReader(open(folder / "log.csv")))
    assert [row["epoch"] for row in log] == ["1", "2"] and all(
        float(row["val_loss"]) > 0 for row in log
    )
    assert log[0]["check_score"] == "" and 0 < float(log[1]["check_score"]) <= 1
    assert (
        len(list((folder / "samples").glob("*.cif"))) == 4
        and len(list(csv.DictReader(open(folder / "samples" / "samples.csv")))) == 4
    )
    for name in (
        "model.safetensors",
        "best.safetensors",
        "checkpoint.safetensors",
        "losses.png",
        "gallery.png",
        "distributions.png",
    ):
        assert (folder / name).stat().st_size > 1000
    out = (
        run(
            "21_sample",
            run="run",
            out="sampling",
            data="prototypes",
            samples=3,
            sweep=2,
            steps="2,4",
        ).parent
        / "sampling"
    )
    assert {row["steps"] for row in csv.DictReader(open(out / "sampling.csv"))} == {
        "2",
        "4",
        "20",
        "100",
    }


@pytest.mark.parametrize(
    "name, parameters, words",
    [
        ("20_train", dict(epoch=3), "Unknown parameter epoch"),
        ("20_train", dict(epochs="many"), "Parameter epochs is 'many', but must be int"),
        ("20_train", dict(preset="papers"), "Unknown preset"),
        ("20_train", dict(data="mp30"), "mp30"),
        ("20_train", dict(precision="half"), "Unknown precision 'half'"),
        ("21_sample", dict(run="nowhere"), "train a model with 20_train first"),
        ("21_sample", dict(steps="5;10"), "separated by commas"),
        ("22_evaluate", dict(steps="5;10"), "separated by commas"),
        ("25_stability", dict(relaxation=10), "Unknown parameter relaxation"),
    ],
)
def test_wrong_parameters_are_refused_in_one_sentence(run, name, parameters, words, tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match=words):
        run(name, **parameters)
    assert not (tmp_path / "runs").exists() and not (tmp_path / "nowhere").exists()
