"""What a person does in a browser: Run all, change the factor, upload a photo; stop training, come back, go on.

In Chromium, against whichever is installed beside pytest: JupyterLab with ipywidgets 8 (`tests/browser.txt`) or Notebook 6.5.7
with ipywidgets 7.7.1, Colab's own. Not run unless asked for: `python -m pytest -m browser -s`.
"""

import importlib.util
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from conftest import fill_in
from PIL import Image

pytestmark = pytest.mark.browser

ROOT = Path(__file__).resolve().parents[1]
LAB = importlib.util.find_spec("jupyterlab") is not None
OPENING, RUNNING, CLICK = 120_000, 240_000, 60_000  # ms of patience, on a slow machine that also does something else

# Fields of the forms, changed as a person would: drawn faces, few of them, and little time
FEW_FACES = 68  # for training, and 8 for testing
FORMS = {"01_data": {"source": "synthetic", "limit": FEW_FACES}, "02_model": {"source": "synthetic"},
         "03_train": {"source": "synthetic", "images": FEW_FACES, "minutes": 0.5}, "04_compare": {"source": "synthetic"}}

OUTPUT = ".jp-OutputArea-output" if LAB else ".output_subarea"
PANEL = f"{OUTPUT} .widget-vbox"
CELLS = "jupyterapp.shell.currentWidget.content.widgets" if LAB else "Jupyter.notebook.get_cells()"
CODE = f"{CELLS}.filter(c => c.model.type == 'code')" if LAB else f"{CELLS}.filter(c => c.cell_type == 'code')"
# How far Run all has come: the smallest execution count of a code cell, 0 while one has not run
COUNT = "c.model.executionCount || 0" if LAB else "c.input_prompt_number > 0 ? c.input_prompt_number : 0"
EXECUTED = f"() => Math.min(...{CODE}.map(c => {COUNT}))"
CONNECTED = ("() => window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel?.status == 'idle'" if LAB else
             "() => window.Jupyter?.notebook?._fully_loaded && Jupyter.notebook.kernel?.is_connected()")
FAILED = f"() => {CODE}.flatMap(c => {'c.model.outputs.toJSON()' if LAB else 'c.output_area.outputs'})"
FAILED += ".filter(output => output.output_type == 'error').map(output => output.evalue)"
# What changes with any picture of the panel
SHOWN = f"""() => [...document.querySelectorAll('{PANEL} img')].filter(i => i.offsetParent).map(i => {{
    const at = i.src.length >> 1; return i.src.length + i.src.slice(at, at + 80) + i.src.slice(-200, -20)}}).join()"""
STATUS = f"() => [...document.querySelectorAll('{OUTPUT} [role=status]')].map(e => e.innerText).join(' ')"
PICTURES = f"() => [...document.querySelectorAll('{OUTPUT} img')].map(i => [i.alt, i.naturalWidth])"


def project_in(folder: Path) -> None:
    """A copy of the project as downloaded, with the forms filled in."""
    for name in ("weights", "docs", "notebooks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns(".ipynb_checkpoints", "srgan-work"))
    shutil.copy(ROOT / "srgan_utils.py", folder)
    for stem, form in FORMS.items():
        path = folder / "notebooks" / f"{stem}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        fill_in(notebook, **form)
        for cell in notebook.cells:
            cell.source = cell.source.replace("else 400\n", f"else {FEW_FACES}\n")  # where there is no GPU
        nbformat.write(notebook, path)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Address, token and folder of a Jupyter server, with settings of its own."""
    place, token = tmp_path_factory.mktemp("browser"), secrets.token_hex(16)
    folder = place / "srgan-celeba"
    project_in(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {f"JUPYTER_{name}_DIR": str(place / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    environment = os.environ | own | {"IPYTHONDIR": str(place / "ipython"), "TORCH_HOME": str(place / "torch"),
                                      "OMP_NUM_THREADS": "1"}  # more would fight with the browser's on two cores
    command = [sys.executable, "-m", "jupyterlab" if LAB else "notebook", "--no-browser", "--allow-root", "--ip=127.0.0.1",
               f"--port={port}", f"--{'IdentityProvider' if LAB else 'NotebookApp'}.token={token}"]
    command += ["--LabApp.expose_app_in_browser=True"] * LAB
    # No question whether to fetch news, which hides what is below it; cells far away stay on the page
    for name, setting in (("apputils-extension/notification", '{"fetchNews": "false"}'),
                          ("notebook-extension/tracker", '{"windowingMode": "none"}')):
        path = place / "CONFIG" / "lab" / "user-settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(setting)
    with open(place / "log", "w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.time() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token={token}", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None and time.time() < deadline, (place / "log").read_text()
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", token, folder
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert program, "these tests need Chromium (Debian: apt-get install chromium)"
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


class Person:
    """Somebody with a notebook open."""

    def __init__(self, browser, server, stem: str):
        address, token, self.folder = server
        self.page = browser.new_context(viewport={"width": 1280, "height": 1400}).new_page()
        self.page.set_default_timeout(CLICK)
        self.page.on("dialog", lambda dialog: dialog.accept())  # "leave the page?"
        # a workspace of their own: in the common one a reload opens the tabs of other tests, too, and may end in one of them
        place = f"lab/workspaces/{stem}/tree/notebooks" if LAB else "notebooks/notebooks"
        self.page.goto(f"{address}/{place}/{stem}.ipynb?token={token}")
        self.page.wait_for_function(CONNECTED, timeout=OPENING)

    def choose(self, menu: str, lab: str, notebook6: str) -> None:
        """An entry of a menu."""
        self.page.click(f"li.lm-MenuBar-item:has-text('{menu}')" if LAB else f"#menus a:text-is('{menu}')")
        self.page.click(f"li.lm-Menu-item[data-command='{lab}']" if LAB else f"#{notebook6}")

    def press_run_all(self) -> None:
        self.choose("Run" if LAB else "Cell", "runmenu:run-all", "run_all_cells")

    def run_all(self) -> None:
        before = self.page.evaluate(EXECUTED)
        self.press_run_all()
        self.page.wait_for_function(f"before => ({EXECUTED})() > before || ({FAILED})().length", arg=before, timeout=RUNNING)
        assert self.page.evaluate(FAILED) == []

    def widget(self, label: str):
        """The control with that label beside it."""
        named = self.page.locator(".widget-label").get_by_text(label, exact=True)
        return self.page.locator(f"{OUTPUT} :has(> .widget-label)").filter(has=named).first

    def button(self, label: str, within: str = ""):
        place = self.widget(within) if within else self.page.locator(OUTPUT)
        return place.locator("button").filter(has_text=re.compile(rf"^\s*{label}\s*(\(\d+\))?$")).first  # FileUpload counts

    @property
    def status(self) -> str:
        return self.page.evaluate(STATUS)

    def changes(self, action, what: str = SHOWN) -> None:
        """Do something, and wait for what it changes, and until all that was asked of the kernel is done."""
        before = self.page.evaluate(what)
        action()
        done = f"before => ({what})() && ({what})() != before && !({STATUS})().includes('enlarging')"  # blank meanwhile
        self.page.wait_for_function(done, arg=before, polling=50)
        self.page.wait_for_function(CONNECTED if LAB else "() => document.querySelector('.kernel_idle_icon')")

    def silent(self) -> list:
        """Pictures without words, or that are none."""
        pictures = self.page.evaluate(PICTURES)
        assert len(pictures) >= 5
        return [each for each in pictures if not (each[0].strip() and each[1])]


@pytest.fixture(scope="module")
def explorer(browser, server):
    """Somebody who opened 04 and pressed Run all."""
    person = Person(browser, server, "04_compare")
    person.run_all()
    person.page.locator(f"{PANEL} img").first.scroll_into_view_if_needed()
    return person


def test_run_all_of_04_fails_nowhere_every_picture_has_words_and_another_factor_is_another_picture(explorer):
    assert explorer.silent() == []
    for factor in ("8x", "2x", "4x"):
        explorer.changes(explorer.button(factor, "Upscale factor").click)
        assert f"{factor}, by the {factor} network" in explorer.status


def test_a_photo_of_ones_own_is_uploaded(explorer, tmp_path):
    photo = Image.effect_noise((320, 240), 60).convert("RGB")
    photo.paste((200, 120, 80), (80, 60, 240, 200))
    photo.save(tmp_path / "me.png")
    explorer.changes(explorer.button("Your photo", "Picture").click, STATUS)

    def upload():
        with explorer.page.expect_file_chooser() as chooser:
            explorer.button("Choose a photo").click()
        chooser.value.set_files(tmp_path / "me.png")

    explorer.changes(upload)
    assert "me 4x, by the 4x network" in explorer.status
    explorer.changes(explorer.button("Enlarge it", "Mode").click)


def test_training_that_is_stopped_goes_on_after_a_reload(browser, server):
    person = Person(browser, server, "03_train")
    person.press_run_all()
    person.page.wait_for_function(f"() => /update [1-9]/.test(({STATUS})())", timeout=RUNNING)
    person.page.locator(f"{OUTPUT} [role=status]").first.scroll_into_view_if_needed()
    person.choose("Kernel", "kernelmenu:interrupt", "int_kernel")
    person.page.wait_for_function(f"() => /stopped at update/.test(({STATUS})())")
    person.page.wait_for_function(f"() => ({EXECUTED})() > 0", timeout=RUNNING)  # the cells below go on
    kept, total = (int(each.replace(",", "")) for each in re.search(r"at update ([\d,]+) of ([\d,]+)", person.status).groups())
    assert person.page.evaluate(FAILED) == [] and 0 < kept < total and person.silent() == []
    assert f"Stopped at update {kept:,} of {total:,}: this is the network as far as it was trained" in person.page.content()

    person.page.reload()
    person.page.wait_for_function(CONNECTED, timeout=OPENING)
    person.run_all()
    assert f"update {total:,} of {total:,}" in person.status and f"continues at update {kept:,}; " in person.page.content()
    (history,) = person.folder.glob("notebooks/srgan-work/runs/*/history.csv")
    steps = [int(line.split(",")[0]) for line in history.read_text().splitlines()[1:]]
    assert steps == list(range(1, total + 1))


@pytest.mark.parametrize("stem", ["01_data", "02_model"])
def test_run_all_fails_nowhere_and_every_picture_has_words(stem, browser, server):
    person = Person(browser, server, stem)
    person.run_all()
    assert person.silent() == []
