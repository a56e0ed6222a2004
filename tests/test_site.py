"""The site: every page, link, image and equation, and search, as files and without a network.

A browser opens every page where there is one (Debian: `apt-get install chromium chromium-driver`);
elsewhere links, anchors and images are looked up in the HTML alone.
"""

import json
import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-unsafe-swiftshader",  # draws crystals without a GPU
]
# What is wrong with a page that is open, as a list of sentences.
PROBLEMS = """
const done = arguments[arguments.length - 1];
const found = [];
for (const image of document.images) {
    image.loading = "eager";
    if (image.complete && image.naturalWidth === 0) found.push("no image " + image.src);
}
const equations = document.querySelectorAll(".math").length;
const set = () => {
    const drawn = document.querySelectorAll("mjx-container svg").length;
    if (drawn < equations) found.push(`${drawn} of ${equations} equations are set`);
    const wrong = document.querySelectorAll("mjx-merror, [data-mjx-error]");
    for (const error of wrong) found.push("equation: " + error.getAttribute("data-mjx-error"));
    if (document.documentElement.scrollWidth > innerWidth)
        found.push(`as wide as ${document.documentElement.scrollWidth} of ${innerWidth} pixels`);
    done(found);
};
if (equations) MathJax.startup.promise.then(set, (error) => done([String(error)]));
else set();
"""


class Page(HTMLParser):
    "The anchors of a page, and what it links to and loads."

    def __init__(self, path):
        super().__init__()
        self.anchors, self.links, self.loaded = set(), [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.anchors.update(given[key] for key in ("id", "name") if given.get(key))
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in ("img", "script") and "src" in given:
            self.loaded.append(given["src"])
        if tag == "link" and given.get("rel") in ("stylesheet", "icon"):
            self.loaded.append(given["href"])


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "Folder of the site, built now; or the one in SYMMBFN_SITE."
    if "SYMMBFN_SITE" in os.environ:
        return Path(os.environ["SYMMBFN_SITE"]).resolve()
    folder = tmp_path_factory.mktemp("site")
    options = ["-c", "docs", "-q", "-W", "--keep-going"]
    command = [sys.executable, "-m", "sphinx", "-M", "html", ".", folder, *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder / "html"


@pytest.fixture(scope="session")
def pages(site):
    "Dict: path -> its Page."
    paths = [p for p in sorted(site.rglob("*.html")) if "_static" not in p.parts]
    return {path: Page(path) for path in paths}


def test_every_notebook_and_page_of_the_docs_is_there(site):
    for path in [*ROOT.glob("nbs/*.ipynb"), *ROOT.glob("docs/*.md")]:
        assert (site / path.relative_to(ROOT)).with_suffix(".html").exists(), path
    for name in ("index.html", "docs/api/generation.html", "CHANGELOG.html", "CONTRIBUTING.html"):
        assert (site / name).exists(), name


def test_links_images_and_anchors_are_there(pages):
    missing = []
    for path, page in pages.items():
        for link in page.links + page.loaded:
            parts = urlsplit(link)
            if parts.scheme in ("http", "https", "mailto", "data"):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            is_there = target.exists()
            if target in pages and anchor and not anchor.startswith(":~:"):
                is_there = anchor in pages[target].anchors
            if not is_there:
                missing.append(f"{path.name}: {link}")
    assert not missing


def test_nothing_is_loaded_from_elsewhere(pages):
    loaded = {link for page in pages.values() for link in page.loaded}
    assert not [link for link in loaded if link.startswith(("http", "//"))]


def test_the_reference_has_what_the_comments_say(site):
    page = (site / "docs/api/continuous.html").read_text()
    assert "accuracy &gt; 0, broadcast against x" in page
    assert "../../nbs/01_continuous.html" in page
    assert "--space-group" in (site / "docs/api/command_line.html").read_text()


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    "Headless Chromium, as narrow as a phone."
    if CHROMIUM is None or shutil.which("chromedriver") is None:
        pytest.skip("There is no Chromium with its driver; the tests above need none.")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    profile = tmp_path_factory.mktemp("profile")
    for flag in [*FLAGS, f"--user-data-dir={profile}", "--window-size=500,900"]:
        options.add_argument(flag)
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options, service)
    driver.set_script_timeout(120)
    yield driver
    driver.quit()


def script_errors(browser):
    return [line["message"] for line in browser.get_log("browser") if line["level"] == "SEVERE"]


def test_every_page_opens_in_a_browser(browser, pages):
    problems = {}
    for path in pages:
        browser.get(path.as_uri())
        found = browser.execute_async_script(PROBLEMS) + script_errors(browser)
        if found:
            problems[path.name] = found
    assert not problems, json.dumps(problems, indent=1)


def test_search_finds_pages_without_a_server(browser, site):
    from selenium.webdriver.support.wait import WebDriverWait

    browser.get((site / "search.html").as_uri() + "?q=wyckoff+position")
    script = "return [...document.querySelectorAll('#search-results li a')].map(a => a.innerText)"
    found = WebDriverWait(browser, 60).until
    found(lambda page: "Wyckoff positions" in page.execute_script(script))  # one by one
    assert not script_errors(browser)


PLACE_OF_LOWEST = """
const y = EXPLORER.properties["mean electronegativity"].values;
const x = EXPLORER.properties["difference of electronegativity"].values;
const lowest = y.indexOf(Math.min(...y));
const part = document.getElementById("explorer-map").firstElementChild?.shadowRoot;
const plot = part?.querySelector(".js-plotly-plot");
if (!plot?._fullLayout?.xaxis) return null;
const {xaxis, yaxis} = plot._fullLayout;
const corner = plot.getBoundingClientRect();
const right = corner.left + xaxis._offset + xaxis.d2p(x[lowest]);
return [lowest, right, corner.top + yaxis._offset + yaxis.d2p(y[lowest])];
"""
NUMBER_SHOWN = """
const part = document.getElementById("explorer-info").firstElementChild.shadowRoot;
return Number(part.querySelector("input").value);
"""


def test_a_click_on_the_map_shows_that_crystal(browser, site):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.support.wait import WebDriverWait

    browser.get((site / "docs/explorer.html").as_uri())
    wait = WebDriverWait(browser, 60)
    lowest, x, y = wait.until(lambda page: page.execute_script(PLACE_OF_LOWEST))
    assert browser.execute_script(NUMBER_SHOWN) != lowest
    actions = ActionChains(browser)
    actions.w3c_actions.pointer_action.move_to_location(round(x), round(y))
    actions.pause(1).click().perform()
    wait.until(lambda page: page.execute_script(NUMBER_SHOWN) == lowest)
    assert not script_errors(browser)


def test_light_and_dark(browser, site):
    def background():
        return browser.execute_script("return getComputedStyle(document.body).backgroundColor")

    browser.get((site / "index.html").as_uri())
    seen = {background()}
    for _ in range(2):
        browser.execute_script("document.querySelector('.theme-toggle').click()")
        seen.add(background())
    assert len(seen) == 2
