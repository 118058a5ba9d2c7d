"""What a person does in a browser: Run all, change the factor, move sliders, upload a photo, save; stop training and continue.

In Chromium, against whichever is installed beside pytest: JupyterLab with ipywidgets 8 (`tests/browser.txt`) or Notebook 6.5.7
with ipywidgets 7.7.1, Colab's own. Not run unless asked for: `python -m pytest -m browser -s`. SRGAN_SCREENSHOTS names a
folder to keep a screenshot of each step in.
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
import zipfile
from functools import partial
from pathlib import Path

import nbformat
import pytest
from conftest import fill_in
from PIL import Image

pytestmark = pytest.mark.browser

ROOT = Path(__file__).resolve().parents[1]
LAB = importlib.util.find_spec("jupyterlab") is not None
NAME = "lab" if LAB else "notebook6"
PATIENCE = {"to open": 120_000, "Run all": 240_000, "a click": 40_000}  # ms, on a slow machine that also does something else

# Fields of the forms, changed as a person would: drawn faces, few of them, and little time
FEW_FACES = 68  # for training, and 8 for testing
FORMS = {"03_train": {"source": "synthetic", "images": FEW_FACES, "minutes": 0.5}, "04_compare": {"source": "synthetic"}}

SCREEN = {"width": 1280, "height": 1400}
OUTPUT = ".jp-OutputArea-output" if LAB else ".output_subarea"
PANEL = f"{OUTPUT} .widget-vbox"

# How far Run all has come: the smallest execution count of a code cell, 0 while one has not run
EXECUTED = ("() => Math.min(...jupyterapp.shell.currentWidget.content.widgets.filter(c => c.model.type == 'code')"
            ".map(c => c.model.executionCount || 0))" if LAB else
            "() => Math.min(...Jupyter.notebook.get_cells().filter(c => c.cell_type == 'code')"
            ".map(c => c.input_prompt_number > 0 ? c.input_prompt_number : 0))")
CONNECTED = ("() => window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel?.status == 'idle'" if LAB else
             "() => window.Jupyter?.notebook?._fully_loaded && Jupyter.notebook.kernel?.is_connected()")
# A number for each picture on the page that a new picture changes
PICTURES = """() => [...document.querySelectorAll('%s img')].filter(i => i.offsetParent).map(i => {
    const at = i.src.length >> 1; return i.src.length + i.src.slice(at, at + 80) + i.src.slice(-200, -20)}).join()""" % OUTPUT
FAILED = ("() => jupyterapp.shell.currentWidget.content.widgets.flatMap(c => c.model.outputs?.toJSON() || [])" if LAB else
          "() => Jupyter.notebook.get_cells().flatMap(c => c.output_area?.outputs || [])")
FAILED += ".filter(output => output.output_type == 'error').map(output => output.evalue)"
STATUS = "() => [...document.querySelectorAll('%s [role=status]')].map(e => e.innerText).join(' ')" % OUTPUT


def open_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def project_in(folder: Path) -> None:
    """A copy of the project as downloaded, with a form filled in: drawn faces, and few of them."""
    folder.mkdir()
    for name in ("srgan_utils.py", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    for name in ("weights", "docs", "notebooks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns(".ipynb_checkpoints", "srgan-work"))
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
    place = tmp_path_factory.mktemp("browser")
    folder, port, token = place / "srgan-celeba", open_port(), secrets.token_hex(16)
    project_in(folder)
    own = {f"JUPYTER_{name}_DIR": str(place / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    environment = os.environ | own | {"IPYTHONDIR": str(place / "ipython"), "TORCH_HOME": str(place / "torch"),
                                      "OMP_NUM_THREADS": "1"}  # more would fight with the browser's on two cores
    command = [sys.executable, "-m", "jupyterlab" if LAB else "notebook", "--no-browser", "--allow-root", "--ip=127.0.0.1",
               f"--port={port}"]
    command += [f"--IdentityProvider.token={token}", "--LabApp.expose_app_in_browser=True"] if LAB else [f"--NotebookApp.token={token}"]
    news = place / "CONFIG" / "lab" / "user-settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    news.parent.mkdir(parents=True)
    news.write_text('{"fetchNews": "false"}')  # JupyterLab's question whether to fetch them hides what is below it
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
        self.address, self.token, self.folder = server
        self.stem = stem
        # A screen that takes touch, too
        self.page = browser.new_context(viewport=SCREEN, has_touch=True).new_page()
        self.page.set_default_timeout(PATIENCE["a click"])
        self.page.on("dialog", lambda dialog: dialog.accept())  # "leave the page?"
        self.open()

    def open(self) -> None:
        # a workspace of their own: in the common one a reload opens the tabs of other tests, too, and may end in one of them
        place = f"lab/workspaces/{self.stem}/tree/notebooks" if LAB else "notebooks/notebooks"
        self.opened = time.time()
        self.page.goto(f"{self.address}/{place}/{self.stem}.ipynb?token={self.token}")
        self.page.wait_for_function(CONNECTED, timeout=PATIENCE["to open"])

    def reload(self) -> None:
        self.page.reload()
        self.page.wait_for_function(CONNECTED, timeout=PATIENCE["to open"])

    def press_run_all(self) -> None:
        if LAB:
            self.page.click("li.lm-MenuBar-item:has-text('Run')")
            self.page.click("li.lm-Menu-item[data-command='runmenu:run-all']")
        else:
            self.page.click("#celllink")
            self.page.click("#run_all_cells")

    def run_all(self) -> None:
        before = self.page.evaluate(EXECUTED)
        self.press_run_all()
        self.page.wait_for_function(f"before => ({EXECUTED})() > before", arg=before, timeout=PATIENCE["Run all"])
        assert self.page.evaluate(FAILED) == []

    def scroll_to(self, code: str) -> None:
        """To the cell with that code: JupyterLab takes what is far away from the page."""
        self.page.evaluate("""code => { const notebook = jupyterapp.shell.currentWidget.content;
            return notebook.scrollToItem(notebook.widgets.findIndex(c => c.model.sharedModel.source.includes(code)), 'start') }""" if LAB
            else "code => Jupyter.notebook.get_cells().find(c => c.get_text().includes(code)).element[0].scrollIntoView()", code)

    def find(self, code: str, item, patience: int = PATIENCE["a click"]):
        """`item` of the output of that cell, once it is there; what appears above it meanwhile moves it out of sight."""
        deadline = time.time() + patience / 1000
        while True:
            self.scroll_to(code)
            self.page.wait_for_timeout(300)
            if item.count() and item.evaluate("e => e.checkVisibility({contentVisibilityAuto: true})"):
                return item
            assert time.time() < deadline, f"{item} did not appear below {code}"

    # --- Controls, found by what they say

    def widget(self, label: str):
        """The control with that label beside it."""
        named = self.page.locator(".widget-label").get_by_text(label, exact=True)
        return self.page.locator(f"{OUTPUT} :has(> .widget-label)").filter(has=named).first

    def button(self, label: str, within: str = ""):
        place = self.widget(within) if within else self.page.locator(OUTPUT)
        return place.locator("button").filter(has_text=re.compile(rf"^\s*{label}\s*(\(\d+\))?$")).first  # FileUpload counts

    def handle(self, label: str):
        return self.widget(label).locator(".noUi-handle, .ui-slider-handle").first

    @property
    def range(self):
        """The before/after slider."""
        return self.page.locator(f"{PANEL} input[type=range]").first

    def state(self, what: str) -> str:
        return self.page.evaluate(what)

    def changes(self, action, what: str = PICTURES) -> float:
        """Seconds from an action to what it changes."""
        before, began = self.page.evaluate(what), time.perf_counter()
        action()
        self.page.wait_for_function(f"before => ({what})() != before", arg=before, polling=50)
        return time.perf_counter() - began

    def settled(self) -> None:
        """Wait until all that was asked of the kernel is done."""
        idle = ("() => jupyterapp.shell.currentWidget.sessionContext.session.kernel.status == 'idle'" if LAB else
                "() => document.querySelector('#kernel_indicator_icon').classList.contains('kernel_idle_icon')")
        self.page.wait_for_function(idle)

    def cut(self) -> str:
        """Where the before/after slider cuts its pictures."""
        return self.range.evaluate("""e => [...e.parentNode.querySelectorAll('*')].map(
            each => getComputedStyle(each).clipPath).filter(path => path != 'none').join()""")

    def picture(self, name: str, folder: Path) -> None:
        """Keep a screenshot."""
        folder = Path(os.environ.get("SRGAN_SCREENSHOTS") or folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=folder / f"{NAME}-{name}.png")


@pytest.fixture(scope="module")
def explorer(browser, server):
    """Somebody who opened 04 and pressed Run all."""
    person = Person(browser, server, "04_compare")
    person.press_run_all()
    person.page.wait_for_function(f"() => ({PICTURES})()", timeout=PATIENCE["Run all"])
    first = time.time() - person.opened
    person.page.wait_for_function(f"() => ({EXECUTED})() > 0", timeout=PATIENCE["Run all"])
    print(f"\n{NAME}: first picture {first:.1f} s after opening, Run all done after {time.time() - person.opened:.1f} s")
    assert person.page.evaluate(FAILED) == []
    person.find("Explorer(", person.button("4x", "Upscale factor"))
    person.scroll_to("Explorer(")
    person.settled()
    yield person
    person.page.context.close()


# --- 04: the panel


def test_another_factor_is_another_picture(explorer, tmp_path):
    for factor in ("8x", "2x", "4x"):
        seconds = explorer.changes(explorer.button(factor, "Upscale factor").click)
        explorer.settled()
        assert factor[0] in explorer.state(STATUS)
        print(f"{NAME}: {factor} after {seconds:.2f} s")
        explorer.picture(f"04-factor-{factor}", tmp_path)


def test_another_face_is_another_picture(explorer, tmp_path):
    print(f"{NAME}: slider {explorer.changes(lambda: explorer.handle('Face').press('ArrowRight')):.2f} s")
    explorer.settled()
    for name in ("Next face", "Previous face"):
        print(f"{NAME}: {name} {explorer.changes(explorer.button(name).click):.2f} s")
        explorer.settled()
    explorer.picture("04-face", tmp_path)


def test_the_face_slider_follows_the_mouse(explorer, tmp_path):
    handle, track = explorer.handle("Face").bounding_box(), explorer.widget("Face").bounding_box()
    x, y = handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2

    def drag():
        explorer.page.mouse.move(x, y)
        explorer.page.mouse.down()
        explorer.page.mouse.move(x + track["width"] / 4, y, steps=5)
        explorer.page.mouse.up()

    explorer.handle("Face").scroll_into_view_if_needed()
    explorer.changes(drag)
    explorer.settled()


@pytest.mark.parametrize("how", ["mouse", "keys", "touch"])
def test_the_cut_follows(how, explorer, tmp_path):
    explorer.range.scroll_into_view_if_needed()
    box, before = explorer.range.bounding_box(), explorer.cut()
    y, start, end = box["y"] + box["height"] / 2, box["x"] + box["width"] * 0.4, box["x"] + box["width"] * 0.8
    assert before
    if how == "mouse":
        explorer.page.mouse.move(start, y)
        explorer.page.mouse.down()
        explorer.page.mouse.move(end, y, steps=5)
        explorer.page.mouse.up()
    elif how == "keys":
        explorer.range.focus()
        for _ in range(5):
            explorer.page.keyboard.press("ArrowLeft")
    else:
        screen = explorer.page.context.new_cdp_session(explorer.page)
        for kind, x in (("touchStart", end), ("touchMove", (start + end) / 2), ("touchMove", start), ("touchEnd", None)):
            points = [] if x is None else [{"x": x, "y": y}]
            screen.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    explorer.page.wait_for_function("""([e, before]) => [...e.parentNode.querySelectorAll('*')].map(
        each => getComputedStyle(each).clipPath).filter(path => path != 'none').join() != before""",
        arg=[explorer.range.element_handle(), before])
    explorer.picture(f"04-cut-{how}", tmp_path)


def test_the_cut_can_compare_other_pictures(explorer, tmp_path):
    for option in explorer.widget("Before/after").get_by_role("button").all()[1:]:
        explorer.changes(option.click)
        explorer.settled()
    explorer.picture("04-before-after", tmp_path)


def test_from_faithful_to_sharp(explorer, tmp_path):
    seconds = explorer.changes(lambda: explorer.handle("Faithful to sharp").press("Home"))
    print(f"{NAME}: faithful {seconds:.2f} s")
    explorer.settled()
    explorer.picture("04-faithful", tmp_path)


def test_save_writes_a_file(explorer, tmp_path):
    def saved():
        return {path: path.stat().st_mtime_ns for path in explorer.folder.rglob("srgan-work/**/*.png")}

    before = saved()
    explorer.changes(explorer.button("Save figure").click, STATUS)
    explorer.settled()
    new = [path for path, when in saved().items() if before.get(path) != when]
    assert new and all(Image.open(path).width > 300 for path in new)
    assert any(path.name in explorer.state(STATUS) for path in new), explorer.state(STATUS)
    explorer.picture("04-saved", tmp_path)


def test_all_factors_side_by_side(explorer, tmp_path):
    seconds = explorer.changes(explorer.button("Compare all factors").click)
    print(f"{NAME}: all factors {seconds:.2f} s")
    explorer.settled()
    explorer.picture("04-all-factors", tmp_path)


def test_a_photo_of_ones_own(explorer, tmp_path):
    """Uploaded, cropped, tested, enlarged."""
    photo = Image.effect_noise((320, 240), 60).convert("RGB")
    photo.paste((200, 120, 80), (80, 60, 240, 200))
    photo.save(tmp_path / "me.png")
    explorer.changes(explorer.button("Your photo", "Picture").click, STATUS)

    def upload():
        with explorer.page.expect_file_chooser() as chooser:
            explorer.button("Choose a photo").click()
        chooser.value.set_files(tmp_path / "me.png")

    print(f"{NAME}: photo {explorer.changes(upload):.2f} s")
    explorer.settled()
    explorer.picture("04-photo", tmp_path)
    for label, key in (("Crop size", "ArrowLeft"), ("Crop left", "ArrowRight"), ("Crop top", "ArrowRight")):
        explorer.changes(partial(explorer.handle(label).press, key))
        explorer.settled()
    explorer.changes(explorer.button("Enlarge it", "Mode").click)
    explorer.settled()
    explorer.changes(lambda: explorer.handle("Any factor").press("ArrowRight"))
    explorer.settled()
    explorer.picture("04-photo-enlarged", tmp_path)


# --- For everybody


def test_every_control_has_a_name_and_every_picture_a_text(explorer):
    nameless = explorer.page.evaluate("""where => [...document.querySelectorAll(
        ['button', 'input', 'select', 'textarea', '[tabindex]'].map(kind => `${where} ${kind}`).join())]
        .filter(e => e.offsetParent && e.tabIndex >= 0).filter(e => {
            const beside = e.closest(':has(> .widget-label)')?.querySelector('.widget-label');
            const names = [e.ariaLabel, e.title, e.innerText, ...[...(e.labels || [])].map(l => l.innerText), beside?.innerText];
            return !names.some(name => name?.trim() && name != 'null')}).map(e => e.outerHTML.slice(0, 300))""", OUTPUT)
    assert nameless == []
    silent = explorer.page.evaluate("""where => [...document.querySelectorAll(`${where} img`)]
        .filter(e => !e.alt.trim()).map(e => e.outerHTML.slice(0, 120))""", OUTPUT)
    assert silent == []


CONTROLS = """where => [...document.querySelectorAll(['button', 'select', 'input[type=range]', '.noUi-handle', '.ui-slider-handle']
    .map(kind => `${where} ${kind}`).join())].filter(e => e.offsetParent && !e.disabled)"""


def test_every_control_is_reached_by_the_tab_key(explorer):
    page = explorer.page
    page.evaluate(f"where => {{ window.reached = new Set(); ({CONTROLS})(where)[0].focus() }}", PANEL)
    count = page.evaluate(f"where => ({CONTROLS})(where).length", PANEL)
    assert count > 10
    for _ in range(3 * count):
        page.evaluate("() => window.reached.add(document.activeElement)")
        page.keyboard.press("Tab")
    missed = page.evaluate(f"where => ({CONTROLS})(where).filter(e => !window.reached.has(e)).map(e => e.outerHTML.slice(0, 200))", PANEL)
    assert missed == []


def test_a_button_is_pressed_by_the_keyboard(explorer):
    explorer.button("2x", "Upscale factor").focus()
    explorer.changes(lambda: explorer.page.keyboard.press("Space"))
    explorer.settled()


def test_legible_at_twice_the_size(explorer, tmp_path):
    """As zoom by the browser does: half as many px, each twice as large. Nothing sticks out of the panel to the right."""
    explorer.page.set_viewport_size({side: px // 2 for side, px in SCREEN.items()})
    explorer.scroll_to("Explorer(")
    explorer.picture("04-zoom", tmp_path)
    outside = explorer.page.evaluate("""where => { const panel = document.querySelector(where), edge = panel.getBoundingClientRect().right;
        return [...panel.querySelectorAll('*')].filter(e => e.offsetParent && e.getBoundingClientRect().right > edge + 2)
            .map(e => [e.getBoundingClientRect().right - edge, e.outerHTML.slice(0, 150)]) }""", PANEL)
    explorer.page.set_viewport_size(SCREEN)
    explorer.scroll_to("Explorer(")
    assert outside == []


# What WCAG calls the contrast of each visible piece of text with what lies behind it
CONTRASTS = """where => {
    const parse = text => { const c = (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number); return c.length < 4 ? [...c, 1] : c };
    const over = (top, under) => top.slice(0, 3).map((c, i) => c * top[3] + under[i] * (1 - top[3]));
    const behind = e => { if (!e) return [255, 255, 255];
        const own = parse(getComputedStyle(e).backgroundColor); return own[3] == 1 ? own.slice(0, 3) : over(own, behind(e.parentElement)) };
    const light = c => c.map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
    return [...document.querySelectorAll(`${where}, ${where} *`)].filter(e => e.offsetParent && [...e.childNodes].some(
        n => n.nodeType == 3 && n.data.trim()) && !['STYLE', 'SCRIPT', 'OPTION'].includes(e.tagName) && !e.disabled).map(e => {
        const ground = behind(e), text = light(over(parse(getComputedStyle(e).color), ground)), back = light(ground);
        return [(Math.max(text, back) + .05) / (Math.min(text, back) + .05), e.innerText.slice(0, 60), e.outerHTML.slice(0, 200)]})}"""


if LAB:  # Notebook 6 has no dark theme
    def test_legible_in_the_dark_theme(explorer, tmp_path):
        explorer.page.evaluate("() => jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})")
        explorer.page.wait_for_selector("body[data-jp-theme-light=false]", state="attached")
        explorer.page.wait_for_selector("#jupyterlab-splash", state="detached")  # which dims all below it
        explorer.picture("04-dark", tmp_path)
        found = explorer.page.evaluate(CONTRASTS, PANEL)
        explorer.page.evaluate("() => jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Light'})")
        explorer.page.wait_for_selector("body[data-jp-theme-light=true]", state="attached")
        assert found and [each for each in found if each[0] < 4.5] == []


# --- 03: stop, reload, continue


def steps(folder: Path) -> list[int]:
    (history,) = folder.glob("notebooks/srgan-work/runs/*/history.csv")
    return [int(line.split(",")[0]) for line in history.read_text().splitlines()[1:]]


def test_training_stopped_and_run_again_after_a_reload_continues(browser, server, tmp_path):
    person = Person(browser, server, "03_train")
    person.press_run_all()
    stop = person.find("Dashboard(", person.button("Stop and save"), PATIENCE["Run all"])
    person.page.wait_for_function(f"() => /update [1-9]/.test(({STATUS})())")
    person.picture("03-training", tmp_path)
    began = time.perf_counter()
    stop.press("Enter")
    person.page.wait_for_function(f"() => /Stopped at update/.test(({STATUS})())")
    print(f"{NAME}: stopped {time.perf_counter() - began:.2f} s after the button")
    person.page.wait_for_function(f"() => ({EXECUTED})() > 0", timeout=PATIENCE["Run all"])
    person.picture("03-stopped", tmp_path)
    kept, total = (int(number.replace(",", "")) for number in re.search(r"update ([\d,]+) of ([\d,]+)", person.state(STATUS)).groups())
    assert 0 < kept < total and steps(person.folder) == list(range(1, kept + 1))

    person.reload()
    person.run_all()
    status = person.find("Dashboard(", person.page.locator(f"{OUTPUT} [role=status]").first)
    person.picture("03-continued", tmp_path)
    assert f"Finished: {total:,} updates" in status.inner_text()
    panel = person.page.locator(OUTPUT).filter(has=person.page.locator("[role=status]")).first
    assert f"continues at update {kept} of {total}" in panel.inner_text()
    assert steps(person.folder) == list(range(1, total + 1))

    person.find("export_button(", person.button("Export as zip")).click()
    person.page.locator(f"{OUTPUT} a[href*='.zip']").first.scroll_into_view_if_needed()
    (packed,) = person.folder.glob("notebooks/srgan-work/runs/*/*.zip")
    assert zipfile.ZipFile(packed).testzip() is None
    person.picture("03-zip", tmp_path)
    person.page.context.close()
