"""JupyterLab opens the tour and runs all of its cells, in headless Chromium.

python tests/lab.py lab.png

A copy of the tour is opened, so that nothing in `nbs` changes. The script fails if a cell does, and
leaves two screenshots: of the end of the tour, and of its crystals.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.request import urlopen

from selenium import webdriver
from selenium.webdriver.support.wait import WebDriverWait

ROOT = Path(__file__).parent.parent
PORT = 8907
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000"]
IS_OPEN = "return Boolean(window.jupyterapp?.shell?.currentWidget?.context);"
RUN_ALL = """
const done = arguments[arguments.length - 1];
const app = window.jupyterapp;
const ready = app.shell.currentWidget.context.ready
    .then(() => app.shell.currentWidget.sessionContext.ready)
    .then(() => app.commands.execute("notebook:run-all-cells"));
ready.then(() => done(null), (error) => done(String(error)));
"""
# Of each code cell: how often it ran, and the names of the errors among its outputs.
CELLS = """
const cells = [...window.jupyterapp.shell.currentWidget.content.model.cells];
return cells.filter((cell) => cell.type === "code").map((cell) => {
    const outputs = cell.toJSON().outputs;
    const errors = outputs.filter((output) => output.output_type === "error");
    return [cell.executionCount, errors.map((error) => error.ename)];
});
"""
SHOW_CRYSTALS = """
const pictures = document.querySelectorAll(".jp-OutputArea-output img");
pictures[pictures.length - 1].scrollIntoView({block: "center"});
return pictures.length;
"""


def start_lab(folder):
    "JupyterLab in a folder, without a token, as a process."
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root"]
    command += [f"--port={PORT}", f"--ServerApp.root_dir={folder}", "--IdentityProvider.token="]
    command += ["--LabApp.expose_app_in_browser=True"]
    lab = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    for _ in range(120):
        time.sleep(0.5)
        try:
            urlopen(f"http://127.0.0.1:{PORT}/api").close()
            return lab
        except OSError:  # not there yet
            continue
    lab.kill()
    raise SystemExit(f"JupyterLab did not answer on port {PORT} within a minute.")


def open_browser():
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome")
    for flag in FLAGS:
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    driver.set_script_timeout(600)
    return driver


def run_tour(driver, picture):
    "Run all cells; raise SystemExit if one fails or none shows a picture."
    driver.get(f"http://127.0.0.1:{PORT}/lab/tree/nbs/index.ipynb")
    WebDriverWait(driver, 120).until(lambda page: page.execute_script(IS_OPEN))
    error = driver.execute_async_script(RUN_ALL)
    cells = driver.execute_script(CELLS)
    driver.save_screenshot(picture)
    pictures = driver.execute_script(SHOW_CRYSTALS)
    time.sleep(2)  # the page scrolls
    driver.save_screenshot(str(Path(picture).with_suffix(".crystals.png")))
    failed = [i for i, (count, errors) in enumerate(cells) if errors or not count]
    if error or failed:
        raise SystemExit(f"Code cells {failed} failed: {error}, {cells}")
    print(f"{len(cells)} code cells ran, {pictures} pictures; see {picture}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "nbs" / "images", Path(folder) / "nbs" / "images")
        shutil.copy(ROOT / "nbs" / "index.ipynb", Path(folder) / "nbs")
        lab = start_lab(folder)
        driver = open_browser()
        try:
            run_tour(driver, sys.argv[1])
        finally:
            driver.quit()
            lab.terminate()
            lab.wait()
