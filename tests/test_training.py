"""Training that can be left alone.

Killed at any moment and restarted, a run ends with the same weights. Several processes compute
what one does, and a recorded epoch what a plain one does."""

import copy
import csv
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys

import pytest
import torch

from symmbfn.core import Channels
from symmbfn.data import load_mp20, load_tensors, save_dataset
from symmbfn.model import BASE, Model
from symmbfn.train import (
    Muon,
    RecordedEpoch,
    RunState,
    TrainConfig,
    count_step,
    epoch_generator,
    make_optimizers,
    pad_batch,
    sample_time_and_noise,
    set_learning_rate,
    stratified_batches,
    take_step,
    train,
    validate,
    weighted_loss,
)

ENV = os.environ | {"OMP_NUM_THREADS": "1"}
SMALL = BASE | dict(hidden=64, embed=16, layers=2, freqs=8)


@pytest.fixture(scope="module")
def data():
    "Crystals of MP-20 of all sizes: 41 to train on and 9 to validate on."
    splits = load_mp20()
    chosen = {}
    for split, n in (("train", 41), ("val", 9)):
        crystals = splits[split]
        chosen[split] = crystals[:: len(crystals) // n][:n]
    return chosen


def read_log(run_dir):
    "The rows of a run's log, without the times."
    with open(run_dir / "log.csv") as file:
        return [row | dict(seconds="") for row in csv.DictReader(file)]


# A run begins with a trained model


def test_a_run_goes_on_from_a_trained_model(tmp_path, data):
    "Its losses are those of the trained model at first, and another model is another run."
    names = ["formation_energy_per_atom", "e_above_hull"]
    train_set, val = data["train"], data["val"].crystals
    once = TrainConfig(epochs=1, optimizer="muon")
    settings = SMALL | dict(properties=names)
    run = dict(model_settings=settings, y=train_set.targets(names), report=lambda row: None)
    first = train(tmp_path / "first", train_set.crystals, val, once, **run)

    more = settings | dict(properties=[*names, "band_gap"], lambda_a=2.0)
    run |= dict(model_settings=more, y=train_set.targets(more["properties"]))
    barely = TrainConfig(epochs=1, lr=1e-12, ema_decay=0.0)  # a step too short to be seen
    second = train(tmp_path / "second", train_set.crystals, val, barely, pretrained=first, **run)
    for name, value in validate(first, val.to(torch.float32)).items():
        if name != "loss":  # which weighs elements differently now
            assert math.isclose(validate(second, val.to(torch.float32))[name], value, rel_tol=1e-5)
    with pytest.raises(ValueError, match="other settings .pretrained"):
        train(tmp_path / "second", train_set.crystals, val, barely, pretrained=second, **run)
    with pytest.raises(ValueError, match="other settings .hidden"):
        run["model_settings"] = more | dict(hidden=32)
        train(tmp_path / "third", train_set.crystals, val, barely, pretrained=first, **run)


# A run is killed


def train_or_die(
    run_dir,  # folder of the run
    data,  # dict of Datasets, 'train' and 'val'
    config,  # TrainConfig
    fatal_replacement,  # number of the file, from 0, that is written but not put in place; or None
):
    "Train, in a process that kills itself just before it puts a certain file in its place."
    torch.set_num_threads(1)
    replace = os.replace  # finished files get their names by it
    count = 0

    def counted(source, target):
        "Replace a file, unless it is the fatal one."
        nonlocal count
        if count == fatal_replacement:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        replace(source, target)

    os.replace = counted
    crystals, val = (data[split].crystals for split in ("train", "val"))
    train(run_dir, crystals, val, config, model_settings=SMALL, report=lambda row: None)


@pytest.fixture
def start(monkeypatch, data):
    "A function that starts a training process; torch is loaded there already, so it is quick."
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["symmbfn.train", "torch._dynamo"])

    def start(run_dir, config, fatal_replacement=None):
        arguments = (run_dir, data, config, fatal_replacement)
        process = context.Process(target=train_or_die, args=arguments)
        process.start()
        return process

    return start


def kill_again_and_again(start, run_dir, config):
    """Continue a run in ten processes, one after another, all of which are killed.

    Six of them kill themselves before they put a file in its place, in their first or second save,
    so that only some of the files are new. Four are killed from outside at a random moment after
    they have saved. None of this depends on the speed of the machine."""
    chance = random.Random(0)
    half_written = 0
    # a save replaces three files: 0 to 2 are the first save's, 3 to 5 the second's
    for fatal_replacement in (0, 1, 2, 4, 5, 3):
        process = start(run_dir, config, fatal_replacement)
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
        half_written += len(list(run_dir.glob("*.part")))
    for _ in range(4):
        before = (run_dir / "checkpoint.safetensors").stat().st_mtime_ns
        process = start(run_dir, config)
        while (run_dir / "checkpoint.safetensors").stat().st_mtime_ns == before:
            assert process.is_alive()
        process.join(chance.uniform(0, 0.05))
        process.kill()
        process.join()
    assert half_written == 6  # each of the first six left one file


def test_killed_ten_times_it_ends_with_the_same_weights(tmp_path, start):
    "Kills between any two files and at random moments; then a process is left to finish the run."
    config = TrainConfig(epochs=150, batch_size=8, validate_every=7, precision="float32")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    start(whole, config).join(120)
    kill_again_and_again(start, killed, config)
    print(f"after ten kills {len(read_log(killed))} epochs are done")
    start(killed, config).join(120)
    for file in ("checkpoint.safetensors", "model.safetensors"):
        a, b = (load_tensors(run_dir / file)[0] for run_dir in (whole, killed))
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].equal(b[name]), name
    assert read_log(whole) == read_log(killed)
    assert len(read_log(whole)) == 150 and not list(killed.glob("*.part"))


# A run of several processes


def command(
    folder,  # where the data sets are
    run_dir,  # name of the run's folder in it
    **options,  # of the command line, such as batch_size=8
):
    "The words of a `symmbfn train` command."
    words = ["symmbfn", "train", str(folder / "train.safetensors")]
    words += ["--val", str(folder / "val.safetensors"), "--run-dir", str(folder / run_dir)]
    words += ["--preset", "base", "--eval-n", "0", "--precision", "float32"]
    for name in ("hidden", "embed", "layers", "freqs"):
        words += ["--set", f"{name}={SMALL[name]}"]
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def execute(words):
    "Run `python -m` with these words; if that fails, show what it wrote to stderr."
    done = subprocess.run(
        [sys.executable, "-m", *words], env=ENV, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr[-3000:]


def assert_same_run(a, b):
    "Check that two runs have the same logs and weights, up to the rounding of sums."
    log_a, log_b = read_log(a), read_log(b)
    assert len(log_a) == len(log_b) == 4
    for row_a, row_b in zip(log_a, log_b):
        assert row_a.keys() == row_b.keys()
        for name, value in row_a.items():
            assert value == row_b[name] or math.isclose(
                float(value), float(row_b[name]), rel_tol=1e-4
            ), (name, row_a, row_b)
    weights_a, weights_b = (load_tensors(run / "model.safetensors")[0] for run in (a, b))
    for name, v in weights_a.items():
        difference = (v - weights_b[name]).double().norm()
        assert difference <= 1e-3 * v.double().norm(), name


@pytest.mark.parametrize("count, batch_size", [(2, 10), (3, 8)])
def test_several_processes_have_the_loss_curve_of_one(tmp_path, data, count, batch_size):
    """Two processes, and three, one of which has no crystals in some batches.

    41 crystals are four batches of 8 and one of 9, or five of 7 and one of 6. The largest crystal
    has more than half of its batch's messages, which leaves one of three processes without any.
    With two processes the run is also stopped after its first epoch and continued."""
    for split in ("train", "val"):
        save_dataset(tmp_path / f"{split}.safetensors", data[split])
    options = dict(epochs=4, batch_size=batch_size, validate_every=2, schedule="cosine")
    execute(command(tmp_path, "alone", **options))
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(count), "-m"]
    sessions = (0, 9) if count == 2 else (9,)  # minutes; with 0 it stops after an epoch
    for minutes in sessions:
        execute([*launch, *command(tmp_path, "together", max_minutes=minutes, **options)])
    assert_same_run(tmp_path / "alone", tmp_path / "together")


# A recorded epoch


def play_again(step, generator):
    "A stand-in for `record_cuda_graph` without a GPU: takes the step now and at every replay."
    step()
    return step


def double_precision_run(crystals, optimizer):
    "The state of a new run in which everything is computed in float64."
    torch.manual_seed(0)
    fixed_shapes = dict(images=False, evidence=False)  # what can be recorded
    settings = BASE | dict(hidden=32, embed=8, layers=1, freqs=2) | fixed_shapes
    model = Model(**settings).standardise(crystals).double()
    optimizers = make_optimizers(model, 1e-3, optimizer)
    for o in optimizers:
        if isinstance(o, Muon):
            o.dtype = torch.float64
    return RunState(
        run_dir=None,
        config=TrainConfig(epochs=1, batch_size=16, ema_decay=0.9, seed=3, precision="float32"),
        origin={},
        prior=None,
        model=model,
        ema=copy.deepcopy(model),
        optimizers=optimizers,
        epochs=1,
        steps_per_epoch=3,
    )


def plain_epoch(state, crystals, n_sites):
    "Train for an epoch without padding, with a recorded epoch's times and noise: mean losses."
    generator = epoch_generator(state.config.seed, 1)
    sums = 0
    for index in stratified_batches(crystals.n, state.config.batch_size, generator):
        padded, _, weight = pad_batch(crystals, crystals.n, index, n_sites)
        t, noise = sample_time_and_noise(padded, generator)
        real, real_site = weight > 0, padded.b < len(index)
        own_noise = Channels(
            noise.k[real], noise.x[real_site], noise.a[real_site], noise.S[real_site]
        )
        batch = (crystals[index[index >= 0]], t[real], own_noise)
        loss, losses = weighted_loss(state.model, "float32", batch)
        set_learning_rate(state.optimizers, state.learning_rate)
        take_step(state, loss)
        count_step(state)
        sums = sums + int(real.sum()) * losses
    return sums / len(crystals)


def weights_of(model):
    "All weights as one vector."
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_recorded_epochs_are_those_of_single_batches(data, optimizer):
    """An epoch of padded batches, as a GPU replays it, against steps on the same crystals alone.

    All is computed in float64, Muon's iteration too, so that the two differ only by the order of
    sums, on any processor: by about 1e-12 of the change of the weights. A crystal that counted
    twice or not at all would make a difference of 1e-2."""
    crystals = data["train"].crystals
    state, plain, untrained = (double_precision_run(crystals, optimizer) for _ in range(3))
    recorded = RecordedEpoch(state, crystals, None, play_again)
    assert weights_of(state.model).equal(weights_of(plain.model))
    for o in state.optimizers:  # the recording has left no trace
        assert not any(v.any() for moments in o.state.values() for v in moments.values())
    losses = recorded(1)
    expected = plain_epoch(plain, crystals, recorded.n_sites)
    for name in ("model", "ema"):
        a, b, before = (weights_of(getattr(run, name)) for run in (state, plain, untrained))
        assert (a - b).norm() < 1e-6 * (b - before).norm()
    assert state.step == plain.step == 3
    for name, value in zip("kxaS", expected.tolist()):
        assert math.isclose(losses[name], value, rel_tol=1e-5)  # summed in float32
