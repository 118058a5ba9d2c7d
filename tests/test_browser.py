"""What a person does in a browser: Run all, change the factor, upload a photo; stop training, come back, go on.

In Chromium, in JupyterLab with ipywidgets 8 (`tests/browser.txt`) or Notebook 6.5.7 with ipywidgets 7.7.1, Colab's own,
whichever is installed beside pytest. Not run unless asked for: `python -m pytest -m browser -s`.
"""

import contextlib
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
from colab_standin import copy_project
from conftest import fill_in
from PIL import Image

pytestmark = pytest.mark.browser

ROOT = Path(__file__).resolve().parents[1]
LAB = importlib.util.find_spec("jupyterlab") is not None
OPENING, RUNNING, CLICK = 120_000, 240_000, 60_000  # ms of patience, on a slow machine that also does something else

FEW_FACES = 68  # for training, and 8 for testing
FORMS = {"03_train": {"source": "synthetic", "images": FEW_FACES, "minutes": 0.5}, "04_compare": {"source": "synthetic"}}

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


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Address, token and folder of a Jupyter server with settings of its own, of the project as downloaded, forms filled in."""
    place, token = tmp_path_factory.mktemp("browser"), secrets.token_hex(16)
    copy_project(ROOT, folder := place / "srgan-celeba")
    for stem, form in FORMS.items():
        notebook = nbformat.read(path := folder / "notebooks" / f"{stem}.ipynb", as_version=4)
        fill_in(notebook, **form)
        for cell in notebook.cells:
            cell.source = cell.source.replace("else 400\n", f"else {FEW_FACES}\n")  # where there is no GPU
        nbformat.write(notebook, path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {f"JUPYTER_{name}_DIR": str(place / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    environment = os.environ | own | {"IPYTHONDIR": str(place / "ipython"), "TORCH_HOME": str(place / "torch"),
                                      "OMP_NUM_THREADS": "1"}  # more would fight with the browser's on two cores
    command = [sys.executable, "-m", "jupyterlab" if LAB else "notebook", "--no-browser", "--allow-root", "--ip=127.0.0.1",
               f"--port={port}", f"--{'IdentityProvider' if LAB else 'NotebookApp'}.token={token}"]
    command += ["--LabApp.expose_app_in_browser=True"] * LAB
    for name, setting in (("apputils-extension/notification", '{"fetchNews": "false"}'),  # a question that hides what is below
                          ("notebook-extension/tracker", '{"windowingMode": "none"}')):  # cells far away stay on the page
        path = place / "CONFIG" / "lab" / "user-settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(setting)
    with open(place / "log", "w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        listening, deadline = False, time.time() + 60
        while not listening:
            assert process.poll() is None and time.time() < deadline, (place / "log").read_text()
            time.sleep(0.2)
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token={token}", timeout=5).close()
                listening = True
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


class Person:  # with a notebook open
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
        self.page.click(f"li.lm-MenuBar-item:has-text('{menu}')" if LAB else f"#menus a:text-is('{menu}')")
        self.page.click(f"li.lm-Menu-item[data-command='{lab}']" if LAB else f"#{notebook6}")

    def press_run_all(self) -> None:
        self.choose("Run" if LAB else "Cell", "runmenu:run-all", "run_all_cells")

    def run_all(self) -> None:
        before = self.page.evaluate(EXECUTED)
        self.press_run_all()
        self.page.wait_for_function(f"before => ({EXECUTED})() > before || ({FAILED})().length", arg=before, timeout=RUNNING)
        assert self.page.evaluate(FAILED) == []

    def button(self, label: str, within: str = ""):
        """The button that says `label`; within: of the control with that label beside it."""
        place = self.page.locator(OUTPUT)
        if within:
            named = self.page.locator(".widget-label").get_by_text(within, exact=True)
            place = self.page.locator(f"{OUTPUT} :has(> .widget-label)").filter(has=named).first
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


def test_after_run_all_of_04_another_factor_is_another_picture_and_a_photo_of_ones_own_is_uploaded(browser, server, tmp_path):
    person = Person(browser, server, "04_compare")
    person.run_all()
    person.page.locator(f"{PANEL} img").first.scroll_into_view_if_needed()
    assert person.silent() == []
    for factor in ("8x", "2x", "4x"):
        person.changes(person.button(factor, "Upscale factor").click)
        assert f"{factor}, by the {factor} network" in person.status

    photo = Image.effect_noise((320, 240), 60).convert("RGB")
    photo.paste((200, 120, 80), (80, 60, 240, 200))
    photo.save(tmp_path / "me.png")
    person.changes(person.button("Your photo", "Picture").click, STATUS)

    def upload():
        with person.page.expect_file_chooser() as chooser:
            person.button("Choose a photo").click()
        chooser.value.set_files(tmp_path / "me.png")

    person.changes(upload)
    assert "me 4x, by the 4x network" in person.status
    person.changes(person.button("Enlarge it", "Mode").click)


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
