"""Test that nothing that goes wrong around a command costs finished work, or is done twice.

Each command is disturbed and started again; what it leaves is what it leaves undisturbed. Commands
run in forked processes, which can be killed. `SYMMBFN_LONG=1 pytest -n 0 tests/test_faults.py`
disturbs all six commands in all ways, and kills each of them twenty times at random moments.

Faults that other files test: screens, predictions, trainings, fine-tunings and evaluations killed
by -9 (test_screen.py, test_predict.py, test_training.py, test_finetune.py, test_evaluate.py), and
damaged files of data and weights (test_files.py, test_weights.py)."""

import ctypes
import http.server
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from click.testing import CliRunner
from pymatgen.core import Lattice, Structure

from symmbfn.__main__ import main
from symmbfn.core import Channels, Crystals, to_dict
from symmbfn.data import Dataset, fit_prior, load_mp20, load_tensors, save_dataset
from symmbfn.datasets import blob_id, fetch
from symmbfn.generation import generate
from symmbfn.model import BASE, Model, load, save_model
from symmbfn.train import TrainConfig, new_run, train, train_epoch

LONG = "SYMMBFN_LONG" in os.environ
FCC = [[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]]
ALLOYS = ["Cu Cu Cu Cu", "Au Au Au Au", "Au Cu Cu Cu", "Au Au Cu Cu", "Ag Ag Ag Cu", "Ag Ag Au Au"]
EMT = "--potential ase.calculators.emt:EMT --workers 1"

pytestmark = pytest.mark.usefixtures("one_thread")


class Case(NamedTuple):
    "A command, and what it leaves."

    words: str  # without the folder to write to, which comes last
    result: str  # file in that folder by which results are compared
    begun: str  # pattern of files that are there when some work has been saved


CASES = dict(
    train=Case(
        "train train.safetensors --val val.safetensors --preset base --set hidden=16 --set embed=8 "
        "--set layers=1 --set freqs=2 --epochs 12 --batch-size 10 --eval-n 0 --run-dir",
        "model.safetensors",
        "checkpoint.safetensors",
    ),
    generate=Case(
        "generate --n 16 --batch-size 2 --steps 2 --n-sites 2 --condition none --no-progress "
        "--model small.safetensors --out",
        "samples.csv",
        "batches/*.safetensors",
    ),
    relax=Case(f"relax cifs {EMT} --no-progress --out", "relaxed.csv", "relaxations.sqlite"),
    evaluate=Case(
        "evaluate cifs --train cifs --relaxations 0 --workers 1 --out",
        "structures.csv",
        "structures.csv",
    ),
    screen=Case(
        f"screen --n 50 --max-crystals 6 --block-size 2 --elements Cu,Au --steps 3 {EMT} "
        "--space-group cubic --no-progress --out",
        "generated.csv",
        "blocks/*.json",
    ),
    finetune=Case(
        "finetune train.safetensors --val val.safetensors --model small.safetensors --epochs 6 "
        "--patience 6 --batch-size 10 --precision float32 --no-progress --out",
        "model.safetensors",
        "checkpoint.safetensors",
    ),
)
ALL = list(CASES)
TWO = ALL if LONG else ["train", "generate"]
ONE = ALL if LONG else ["generate"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with what the commands read, in which they run, and a cache of its own."
    folder = tmp_path_factory.mktemp("faults")
    splits = load_mp20()
    for split, n in (("train", 30), ("val", 10)):
        data = splits[split][:n]
        save_dataset(folder / f"{split}.safetensors", Dataset(data.crystals, data.ids))
    torch.manual_seed(0)
    crystals = splits["train"][:300].crystals
    model = Model(**BASE | dict(hidden=16, embed=8, layers=1, freqs=2, properties=[]))
    save_model(folder / "small.safetensors", model.standardise(crystals), fit_prior(crystals))
    (folder / "cifs").mkdir()
    for i, elements in enumerate(ALLOYS):
        structure = Structure(Lattice.cubic(3.8 + i / 50), elements.split(), FCC)
        structure.to(folder / "cifs" / f"{i}.cif")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SYMMBFN_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        yield folder


class Ended(NamedTuple):
    "How a command ended."

    exit_code: int  # negative: the signal that killed it
    said: str  # on stderr
    seconds: float


class Command:
    "A command that runs in a forked process."

    def __init__(
        self,
        name,  # of a Case
        out,  # folder to write to
        prepare=None,  # called in the process before the command
    ):
        self.answer = Path(f"{out}.answer")
        self.answer.unlink(missing_ok=True)
        words = [*CASES[name].words.split(), str(out)]
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=self._run, args=(words, prepare))
        self.began = time.monotonic()
        self.process.start()

    def _run(self, words, prepare):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        answer = os.open(self.answer, os.O_WRONLY | os.O_CREAT)  # before anything is forbidden
        if prepare:
            prepare()
        done = CliRunner().invoke(main, words)
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)[1]  # see `full_disk`
        resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, unlimited))
        os.write(answer, json.dumps([done.exit_code, done.stderr]).encode())
        os._exit(0)  # leaves pytest's own ends of processes out

    def wait(self):
        "Wait for the end, at most five minutes."
        self.process.join(300)
        assert self.process.exitcode is not None
        seconds = time.monotonic() - self.began
        if self.process.exitcode != 0:
            return Ended(self.process.exitcode, "", seconds)
        return Ended(*json.loads(self.answer.read_text()), seconds)

    def wait_until(self, out, pattern):
        "Wait until there is such a file; whether it came before the end."
        while not list(Path(out).glob(pattern)):
            if self.process.exitcode is not None:
                return False
            time.sleep(0.002)
        return True

    def send(self, number):
        "Send a signal, unless the process has ended."
        if self.process.exitcode is None:
            os.kill(self.process.pid, number)


def result_of(name, out):
    "What a command left: the content of a table, or the tensors of a model as bytes."
    path = Path(out) / CASES[name].result
    if path.suffix != ".safetensors":
        return path.read_bytes()
    tensors, _ = load_tensors(path)
    return {key: v.numpy().tobytes() for key, v in tensors.items()}


def in_one_line(ended):
    "Whether a command failed with one clear line, and nothing of Python."
    line = ended.said.strip().splitlines()[-1]
    return ended.exit_code in (1, 2) and line.startswith("Error: ") and "Traceback" not in line


@pytest.fixture(scope="module")
def whole(place):
    "Name of a command -> what it leaves if nothing disturbs it, and how long it takes."
    found = {}

    def get(name):
        if name not in found:
            words = [*CASES[name].words.split(), str(place / f"whole_{name}")]
            began = time.monotonic()
            # in this process, so that the forked ones have what it imports
            done = CliRunner().invoke(main, words)
            assert done.exit_code == 0 or name == "screen", done.output  # its budget is spent
            seconds = time.monotonic() - began
            found[name] = result_of(name, place / f"whole_{name}"), seconds
        return found[name]

    return get


def finish(name, out, whole):
    "Start a command again, undisturbed: it ends with what it leaves if nothing ever disturbed it."
    ended = Command(name, out).wait()
    assert ended.exit_code == 0 or "novel crystals were found" in ended.said, ended.said
    assert result_of(name, out) == whole(name)[0]
    assert not list(Path(out).glob("batches")) and not list(Path(out).glob("*.part.*"))


@pytest.mark.parametrize("name", ONE)
def test_killed_at_random_moments(name, place, whole):
    "What was saved before a kill is there after it, whenever that comes."
    out = place / f"killed_{name}"
    chance = random.Random()
    saved = set()
    for _ in range(20 if LONG else 3):
        command = Command(name, out)
        time.sleep(chance.uniform(0, whole(name)[1] / 2))
        command.send(signal.SIGKILL)
        command.wait()
        if not (out / CASES[name].result).exists():
            there = set(out.glob(CASES[name].begun))
            assert saved <= there
            saved = there
    finish(name, out, whole)


@pytest.mark.parametrize("name", ONE)
def test_interrupted_by_hand(name, place, whole):
    "Ctrl-C as soon as something is saved: one word, and the work goes on later."
    out = place / f"interrupted_{name}"
    whole(name)
    command = Command(name, out)
    was_at_work = command.wait_until(out, CASES[name].begun)
    command.send(signal.SIGINT)
    ended = command.wait()
    if was_at_work and ended.exit_code != 0:
        assert ended.exit_code in (1, 130) and "Traceback" not in ended.said
    finish(name, out, whole)


def full_disk(size):
    "Make the function that lets no file of a process get longer than some bytes."

    def forbid():
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, unlimited))

    return forbid


@pytest.mark.parametrize("size", [100, 3000, 9000] if LONG else [3000])
@pytest.mark.parametrize("name", TWO)
def test_a_full_disk(name, size, place, whole):
    "The command says so in a line; with space it goes on."
    out = place / f"full_{name}_{size}"
    whole(name)
    ended = Command(name, out, full_disk(size)).wait()
    if name == "evaluate" and size > 100:  # which is enough for its files of a few crystals
        assert result_of(name, out) == whole(name)[0]
    else:
        assert in_one_line(ended), ended.said
    finish(name, out, whole)


def without_powers():
    "Let permissions hold for this process even if it is root's."
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    nothing = (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None, use_errno=True).capset(header, nothing) == 0


@pytest.mark.parametrize("name", ONE)
def test_a_folder_without_permission(name, place, whole):
    whole(name)
    parent = place / f"forbidden_{name}"
    parent.mkdir(mode=0o555)
    ended = Command(name, parent / "out", without_powers).wait()
    assert in_one_line(ended), ended.said
    assert "Permission" in ended.said or "another folder" in ended.said, ended.said
    assert not list(parent.glob("out/*"))


@pytest.mark.parametrize("name", ALL if LONG else ["relax"])
def test_a_cache_that_cannot_be_written(name, place, whole, tmp_path):
    "Without a cache a command works, or says what to do."
    whole(name)
    (tmp_path / "cache").mkdir(mode=0o555)
    out = place / f"uncached_{name}"

    def prepare():
        without_powers()
        os.environ["SYMMBFN_CACHE"] = str(tmp_path / "cache")

    ended = Command(name, out, prepare).wait()
    assert ended.exit_code == 0 or in_one_line(ended) or name == "screen", ended.said
    if ended.exit_code != 0 and name != "screen":
        assert "SYMMBFN_CACHE" in ended.said, ended.said
    finish(name, out, whole)


@pytest.mark.parametrize("name", [name for name in TWO if name != "evaluate"])
def test_two_processes_in_one_folder(name, place, whole):
    "The second is refused while the first is at work, which is stopped for a while."
    out = place / f"two_{name}"
    whole(name)
    first = Command(name, out)
    assert first.wait_until(out, CASES[name].begun)
    first.send(signal.SIGSTOP)
    assert first.process.exitcode is None
    there = set(out.rglob("*"))
    second = Command(name, out).wait()
    assert second.exit_code == 2 and "Another process" in second.said, second.said
    assert set(out.rglob("*")) == there
    first.send(signal.SIGCONT)
    first.wait()
    finish(name, out, whole)


@pytest.mark.parametrize("name", ONE)
def test_truncated_files(name, place, whole):
    "Each file of a finished folder is cut: the command goes on, or names the file and stops."
    whole(name)
    files = [path for path in (place / f"whole_{name}").rglob("*") if path.is_file()]
    endings = {path.suffix: path for path in sorted(files)}  # one of each kind
    for ending, path in endings.items():
        out = place / f"cut_{name}{ending}"
        shutil.copytree(place / f"whole_{name}", out)
        cut = out / path.relative_to(place / f"whole_{name}")
        cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
        ended = Command(name, out).wait()
        if ended.exit_code == 0 or "novel crystals were found" in ended.said:
            assert result_of(name, out) == whole(name)[0], cut
        else:
            assert in_one_line(ended) and cut.name in ended.said, (cut, ended.said)


def test_a_damaged_cache_is_made_again(place, whole):
    "The energies of the elements, which `relax` keeps there, are cut in the middle of a number."
    whole("relax")
    (cache,) = (place / "cache").glob("elements_*.json")
    good = cache.read_text()
    cache.write_text(good[: len(good) // 2])
    finish("relax", place / "damaged_cache", whole)
    assert json.loads(cache.read_text()).keys() == json.loads(good).keys()


def test_a_download_that_breaks_off_leaves_nothing(tmp_path):
    "A server that promises more than it sends; then one that sends something else."

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "1000" if self.path == "/short" else "7")
            self.end_headers()
            self.wfile.write(b"content")

        def log_message(self, *args):
            "Says nothing."

    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        for page, error in (("short", ConnectionError), ("other", ValueError)):
            with pytest.raises(error, match="try again"):
                fetch(f"{url}/{page}", tmp_path / "file", blob_id(b"expected"))
            assert not list(tmp_path.iterdir())
        fetch(f"{url}/right", tmp_path / "file", blob_id(b"content"))
        server.shutdown()
    assert (tmp_path / "file").read_bytes() == b"content"


def jumping_clock():
    "Let the time of day jump back and forth, as when a clock is set."
    chance = random.Random(0)
    time.time = lambda: chance.uniform(0, 4e9)


@pytest.mark.parametrize("name", ONE)
def test_a_clock_that_jumps(name, place, whole):
    out = place / f"clock_{name}"
    whole(name)
    ended = Command(name, out, jumping_clock).wait()
    assert ended.exit_code == 0 or name == "screen", ended.said
    assert result_of(name, out) == whole(name)[0]


# Numbers that are not finite


def test_training_stops_at_the_batch_that_is_not_finite_and_saves_it(tmp_path):
    "A cell of a crystal is larger than any number; its loss is computed again from the file."
    crystals = load_mp20()["train"][:30].crystals
    broken = replace(crystals, k=crystals.k.clone())
    broken.k[17, 5] = 1e30
    tiny = BASE | dict(hidden=16, embed=8, layers=1, freqs=2)
    options = dict(model_settings=tiny, report=lambda row: None)
    config = TrainConfig(epochs=2, batch_size=10, precision="float32")
    begun = train(tmp_path / "run", crystals, crystals[:5], config, **options)
    state = new_run(tmp_path / "new", crystals, crystals[:5], config, model_settings=tiny)
    with pytest.raises(FloatingPointError, match="In step [123], the loss of .* no finite number"):
        train_epoch(state, broken.to(torch.float32), None, 1)
    assert all(v.isfinite().all() for v in state.model.state_dict().values())
    assert not list((tmp_path / "new").glob("checkpoint*"))
    tensors, about = load_tensors(tmp_path / "new" / "not_finite.safetensors")
    part = {
        name: {k.split(".", 1)[1]: v for k, v in tensors.items() if k.startswith(f"{name}.")}
        for name in ("crystals", "noise", "model")
    }
    begun.load_state_dict(part["model"])
    batch = (Crystals(**part["crystals"]), tensors["t"], Channels(**part["noise"]))
    losses = begun.losses(*batch)
    assert about["broken"] and not all(v.isfinite() for v in to_dict(losses).values())
    assert any(abs(k) > 1e29 for k in batch[0].k[:, 5])


def test_sampling_stops_at_an_estimate_that_is_not_finite(place):
    "Weights that are so large that products of them are no numbers any more."
    trained = load(place / "small.safetensors")
    for weights in trained.model.parameters():
        weights.data.fill_(1e30)
    with pytest.raises(
        FloatingPointError, match="At time 0.000 the network's estimate of .*finite"
    ):
        generate(2, model=trained, n_sites=2, steps=3, progress=False, condition=None)
