"Two workers share the machine: each computes with one thread, unless told otherwise."

import os

import pytest
from xdist.scheduler import LoadScopeScheduling

os.environ.setdefault("OMP_NUM_THREADS", "1")
NOTEBOOKS = "test_notebooks.py"


@pytest.fixture(scope="module")
def one_thread():
    """Rounding depends on the number of threads, which an earlier test may have changed; a process
    that a test starts and kills has one."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class NotebooksOneByOne(LoadScopeScheduling):
    "Tests of a file stay together, since they share what they make; notebooks share nothing."

    def _split_scope(self, nodeid):
        file = nodeid.split("::")[0]
        return nodeid if file.endswith(NOTEBOOKS) else file


def pytest_xdist_make_scheduler(config, log):
    return NotebooksOneByOne(config, log)


def pytest_collection_modifyitems(items):
    "Notebooks, which take longest, come first."
    items.sort(key=lambda item: item.path.name != NOTEBOOKS)  # else the order stays
