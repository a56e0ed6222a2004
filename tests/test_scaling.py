"""Test work on the workers of a Dask scheduler: they are killed again and again, and the files are
those of one process. `SYMMBFN_LONG=1 pytest -n 0 tests/test_scaling.py` takes 20,000 crystals."""

import multiprocessing
import os
import random
import signal
import threading
import time

import dask
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from distributed import Client, LocalCluster
from pymatgen.core import Lattice, Structure

from symmbfn.__main__ import main
from symmbfn.core import concat, to_dict
from symmbfn.data import fit_prior, load_dataset, load_mp20
from symmbfn.generation import generate, load_batches
from symmbfn.model import BASE, Model, load, save_model
from symmbfn.scaling import Scheduler, check_versions, do_block, installed
from symmbfn.screening import BudgetSpent, screen

LONG = "SYMMBFN_LONG" in os.environ
N_CRYSTALS, BATCH_SIZE, N_WORKERS = (20_000, 50, 4) if LONG else (96, 6, 2)
N_KILLS = 1000 if LONG else 3  # at most
SECONDS_BETWEEN_KILLS = 4 if LONG else 0.5
only_long = pytest.mark.skipif(not LONG, reason="takes a minute: set SYMMBFN_LONG=1")
FCC = [[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]]

pytestmark = pytest.mark.usefixtures("one_thread")


def run(*words):
    "Run a command in this process. Returns click's Result: exit_code, output, stderr."
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture(scope="module")
def cluster():
    "Workers as processes of their own, which are started again when they die."
    quick = {"distributed.worker.multiprocessing-method": "forkserver"}
    with dask.config.set(quick):
        # what has to be imported is there already when a worker is started again
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["distributed", "symmbfn.screening"])
        with LocalCluster(
            n_workers=N_WORKERS, threads_per_worker=1, dashboard_address=None
        ) as cluster:
            yield cluster


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    "The path of a small network with random weights, which samples quickly."
    torch.manual_seed(0)
    crystals = load_mp20()["train"][:500].crystals
    model = Model(**BASE | dict(hidden=16, embed=8, layers=1, freqs=2, properties=[]))
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_model(path, model.standardise(crystals), fit_prior(crystals))
    return path


class Killer(threading.Thread):
    "Kills a random worker again and again, once there are crystals, until it is told to stop."

    def __init__(self, cluster, folder):
        super().__init__(daemon=True)
        self.workers = cluster.workers
        self.folder = folder
        self.over = threading.Event()
        self.kills = 0

    def run(self):
        chance = random.Random(0)
        while not list(self.folder.glob("batches/*.safetensors")):
            time.sleep(0.01)
        while self.kills < N_KILLS and not self.over.wait(SECONDS_BETWEEN_KILLS):
            pid = chance.choice(list(self.workers.values())).pid
            if pid is not None:  # else it is being started
                os.kill(pid, signal.SIGKILL)
                self.kills += 1


def test_killed_workers_lose_and_repeat_nothing(cluster, small, tmp_path):
    "Every crystal is there once, and all files are those of one process, bit for bit."
    request = dict(n=N_CRYSTALS, model=small, n_sites=2, steps=2, batch_size=BATCH_SIZE)
    request |= dict(condition=None, progress=False)
    killer = Killer(cluster, tmp_path / "many")
    killer.start()
    began = time.perf_counter()
    scheduler = Scheduler(cluster)
    many = generate(**request, out=tmp_path / "many", scheduler=scheduler)
    killer.over.set()
    scheduler.close()
    seconds = time.perf_counter() - began
    print(f"{N_CRYSTALS} crystals, {killer.kills} workers killed, {seconds:.0f} s")
    began = time.perf_counter()
    one = generate(**request, out=tmp_path / "one")
    print(f"one process: {time.perf_counter() - began:.0f} s")
    assert killer.kills > 0
    assert many.table["crystal"].tolist() == list(range(N_CRYSTALS))
    stored = [load_dataset(tmp_path / d / "crystals.safetensors")[0] for d in ("many", "one")]
    tensors = [to_dict(data.crystals) for data in stored]
    assert all(v.equal(tensors[1][name]) for name, v in tensors[0].items())
    files = {path.name for path in (tmp_path / "one").iterdir()}
    assert files == {path.name for path in (tmp_path / "many").iterdir()}
    for name in files - {"crystals.safetensors"}:
        assert (tmp_path / "many" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert many.table.equals(one.table)


@only_long
def test_screen_with_workers_is_the_screen_of_one_process(cluster, tmp_path):
    question = dict(elements="Cu,Au", space_group="cubic", potential="ase.calculators.emt:EMT")
    question |= dict(n=50, max_crystals=8, block_size=8, batch_size=4, steps=5, progress=False)
    scheduler = Scheduler(cluster)
    for name, how in dict(one=dict(workers=1), many=dict(scheduler=scheduler)).items():
        with pytest.raises(BudgetSpent):
            screen(**question, **how, out=tmp_path / name)
    scheduler.close()
    for name in ("ranking.csv", "generated.csv", "crystals/samples.csv"):
        assert (tmp_path / "many" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


DEADLY = """
import os

from ase.calculators.emt import EMT


class Deadly(EMT):
    def calculate(self, atoms=None, *args, **kwargs):
        if 79 in atoms.numbers:
            os._exit(1)
        super().calculate(atoms, *args, **kwargs)


def make():
    return Deadly()
"""


@only_long
def test_a_crystal_that_kills_its_workers_costs_one_row(cluster, tmp_path, monkeypatch):
    "Gold ends the process. From the command line, with and without workers elsewhere."
    (tmp_path / "deadly.py").write_text(DEADLY)
    monkeypatch.syspath_prepend(tmp_path)
    for element, a in dict(Cu=3.7, Ag=4.1, Au=4.1, Pt=4.0).items():
        Structure(Lattice.cubic(a), [element] * 4, FCC).to(tmp_path / f"{element}.cif")
    scheduler = Scheduler(cluster)
    scheduler.client.run(lambda: __import__("sys").path.insert(0, str(tmp_path)))
    scheduler.close()
    words = ("relax", tmp_path, "--potential", "deadly:make", "--no-progress")
    address = ("--scheduler", cluster.scheduler_address)
    done = run(*words, *address, "--out", tmp_path / "many")
    assert done.exit_code == 0, done.output
    table = pd.read_csv(tmp_path / "many" / "relaxed.csv").set_index("name")
    assert table["reason_relaxed"]["Au"] == "its process died"
    assert table["relaxed"].to_dict() == dict(Ag=True, Au=False, Cu=True, Pt=True)


def test_a_scheduler_that_goes_away_is_named_and_the_rest_is_done_without(small, tmp_path):
    "It goes when some crystals are there. They stay, and one process completes them."
    out = tmp_path / "out"
    request = dict(n=40, model=small, n_sites=2, steps=2, batch_size=2, condition=None)
    request |= dict(progress=False, out=out)
    cluster = LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None
    )

    def close():
        while not list(out.glob("batches/*.safetensors")):
            time.sleep(0.01)
        cluster.close()

    closing = threading.Thread(target=close, daemon=True)
    closing.start()
    at_once = {"distributed.comm.timeouts.connect": "1s"}  # the client tries no longer
    with dask.config.set(at_once), pytest.raises(ConnectionError, match="is gone: start it"):
        generate(**request, scheduler=Scheduler(cluster, patience=1))
    closing.join()
    there = concat(load_batches(out, 0))
    whole = generate(**request)
    assert 0 < len(there) < 40
    assert whole.table["crystal"].tolist() == list(range(40))
    assert whole.crystals.x[: there.n.sum()].equal(there.x)


def test_workers_that_cannot_be_used_are_named(small):
    threads = dict(processes=False, dashboard_address=None)
    with LocalCluster(n_workers=1, threads_per_worker=2, **threads) as cluster:
        with pytest.raises(ValueError, match="has 2 threads: start workers with --nthreads 1"):
            Scheduler(cluster)
        with Client(cluster) as client:  # as if the worker had come later
            late = client.submit(do_block, installed(), abs, -1)
            with pytest.raises(ValueError, match="has 2 threads: start workers with --nthreads 1"):
                late.result()
        cluster.scale(0)
        while cluster.scheduler_info["workers"]:
            time.sleep(0.05)
        with pytest.raises(ConnectionError, match="has no worker: start some"):
            Scheduler(cluster, patience=0.1)
    other = tuple(dict(installed(), torch="1.0").items())
    with pytest.raises(ValueError, match="has torch .* instead of 1.0"):
        check_versions(other)
    with LocalCluster(n_workers=1, threads_per_worker=1, **threads) as cluster:
        scheduler = Scheduler(cluster)
        with pytest.raises(ValueError, match="path of a weights file"):
            generate(1, model=load(small), scheduler=scheduler)
        scheduler.close()


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "nonsense://x"])
def test_an_address_where_nobody_answers_is_refused(address, monkeypatch, tmp_path):
    monkeypatch.setattr("symmbfn.scaling.PATIENCE", 0.5)
    done = run("generate", "--n", 1, "--scheduler", address, "--out", tmp_path / "out")
    assert done.exit_code == 1 and "No scheduler answers" in done.stderr
    assert not (tmp_path / "out").exists()


def test_without_dask_a_sentence_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "distributed", None)
    done = run("generate", "--n", 1, "--scheduler", "tcp://x:1", "--out", tmp_path / "out")
    assert done.exit_code == 1 and "pip install 'symmbfn[dask]'" in done.stderr
