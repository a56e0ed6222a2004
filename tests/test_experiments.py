"The experiments as papermill runs them: parameters take effect or are refused."

import csv
import shutil
from pathlib import Path

import nbformat
import papermill
import pytest

from symmbfn import load
from symmbfn.data import load_mp20
from symmbfn.model import BASE
from symmbfn.train import TrainConfig, train

root = Path(__file__).parent.parent


@pytest.fixture
def run(tmp_path, monkeypatch):
    "A function that executes an experiment in an empty folder and returns that folder."
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.chdir(tmp_path)

    def execute(name, **parameters):
        papermill.execute_notebook(
            root / "nbs" / f"{name}.ipynb",
            tmp_path / f"{name}.ipynb",
            parameters=parameters,
            progress_bar=False,
        )
        return tmp_path

    return execute


def read_csv(path):
    "A dict for each row of a CSV file."
    with open(path) as file:
        return list(csv.DictReader(file))


SMALL = dict(
    run_dir="run",
    limit=60,
    val_limit=30,
    epochs=2,
    hidden=16,
    embed=8,
    layers=1,
    freqs=2,
    samples=4,
    steps=3,
    validate_every=1,
    eval_n=6,
    eval_every=2,
)


def test_train_then_sample(run):
    "A training run leaves its files in its folder, and 21_sample takes its model from there."
    folder = run("20_train", **SMALL) / "run"
    log = read_csv(folder / "log.csv")
    assert [row["epoch"] for row in log] == ["1", "2"]
    assert all(float(row["val_loss"]) > 0 for row in log)
    assert log[0]["eval_score"] == "" and 0 < float(log[1]["eval_score"]) <= 1
    assert len(list((folder / "samples").glob("*.cif"))) == 4
    assert len(read_csv(folder / "samples" / "samples.csv")) == 4
    for name in ("losses.png", "gallery.png", "distributions.png"):
        assert (folder / name).stat().st_size > 1000
    for name in ("model", "best", "checkpoint"):
        assert (folder / f"{name}.safetensors").stat().st_size > 1000

    sampled = dict(run_dir="run", out="sampling", samples=3, sweep=2, steps="2,4")
    rows = read_csv(run("21_sample", **sampled) / "sampling" / "sampling.csv")
    assert {"2", "4"} <= {row["steps"] for row in rows}


def test_weights_are_made_of_a_run(run, tmp_path):
    "31_weights makes a file of weights of a run, with its card."
    data = load_mp20()["train"].crystals[:40]
    small = BASE | {name: SMALL[name] for name in ("hidden", "embed", "layers", "freqs")}
    config = TrainConfig(epochs=2, batch_size=20, validate_every=1)
    train(tmp_path / "run", data, data, config, model_settings=small)
    few = dict(samples=6, steps=2, paper_steps=2, short_steps=2)
    run("31_weights", run_dir="run", out="made.safetensors", machine="a test", **few)
    meta = load(tmp_path / "made.safetensors").meta
    assert meta["training"]["epochs"] == 2 and meta["training"]["machine"] == "a test"
    assert [row["epoch"] for row in meta["curve"]] == [1, 2] and meta["earlier"] == []
    counts = meta["metrics"]["ways"]["ours"]["counts"]
    assert counts["valid"] == 6 and counts["radii, 1 to 3 sites"] <= 6
    assert 0 < meta["metrics"]["floor"]["shares"]["one element"] < 0.001


def test_more_data_measures_a_network(run, tmp_path):
    "The package's own weights as the other network: equal rows for both."
    shutil.copy(root / "nbs" / "tables" / "more.csv.gz", tmp_path)
    weights = str(root / "symmbfn" / "weights.safetensors")
    few = dict(samples=3, relaxations=1, steps=4, workers=1)
    folder = run("35_more_data", weights=weights, tables=str(tmp_path), **few)
    rows = read_csv(folder / "more_measured.csv")
    assert len(rows) == 10
    assert {row.pop("network") for row in rows} == {"package", "with more data"}
    for row in rows:
        row.pop("new")  # the second network has seen more
        row.pop("metastable_new")
    assert rows[:5] == rows[5:]


WRONG = [  # experiment, parameters, words of the error message
    ("20_train", dict(epoch=3), "Unknown parameter epoch"),
    ("20_train", dict(epochs="many"), "Parameter epochs is 'many', but must be int"),
    ("20_train", dict(batch_size=0), "batch_size is 0: give a whole number from 1"),
    ("20_train", dict(preset="papers"), "Unknown preset"),
    ("20_train", dict(data="mp30"), "mp30"),
    ("20_train", dict(precision="half"), "Unknown precision 'half'"),
    ("21_sample", dict(run_dir="nowhere"), "train a model with 20_train first"),
    ("21_sample", dict(steps="5;10"), "separated by commas"),
    ("22_evaluate", dict(step=5), "Unknown parameter step"),
    ("25_stability", dict(relaxation=10), "Unknown parameter relaxation"),
    ("32_calibration", dict(measure="all"), "Parameter measure is 'all', but must be bool"),
    ("32_calibration", dict(measure=True, data="none"), "There is no folder peers to measure"),
    ("35_more_data", dict(measure=True, data="none"), "There is no none/mp_more"),
    ("35_more_data", dict(weights="none"), "There is no none to measure"),
    ("37_screens", dict(sample=5), "Unknown parameter sample"),
    ("39_band_gap", dict(sample=5), "Unknown parameter sample"),
    ("39_band_gap", dict(limit=5), "limit is 5: give 20 at least"),
    ("41_predictions", dict(sample=5), "Unknown parameter sample"),
    ("41_predictions", dict(n_test=2, n_many=3), "n_many is 3: give at most n_test"),
    ("44_potentials", dict(sample=5), "Unknown parameter sample"),
    ("44_potentials", dict(samples=2, relaxations=3), "relaxations is 3: give at most samples"),
    ("47_what_helps", dict(sample=5), "Unknown parameter sample"),
]


FIRST_CELLS = 8  # code cells in which every wrong parameter must have been refused


def begin(name, parameters):
    "Execute the first code cells of an experiment here, which is faster than in a kernel."
    page = nbformat.read(root / "nbs" / f"{name}.ipynb", 4)
    cells = [cell for cell in page.cells if cell.cell_type == "code"]
    variables = {}
    for cell in cells[:FIRST_CELLS]:
        exec(compile(cell.source, name, "exec"), variables)
        if "parameters" in cell.metadata.get("tags", []):
            variables |= parameters


@pytest.mark.parametrize("name, parameters, words", WRONG)
def test_wrong_parameters_are_refused_in_one_sentence(
    name, parameters, words, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SYMMBFN_DATA", raising=False)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        begin(name, parameters)
    assert not any(tmp_path.iterdir())


def test_a_wrong_parameter_stops_papermill(run, tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match="Unknown parameter epoch"):
        run("20_train", epoch=3)
    assert not (tmp_path / "runs").exists()
