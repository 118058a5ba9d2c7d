"""What a person does in a browser: Run all, change the factor, move sliders, upload a photo, save; stop training and continue.

In Chromium, against whichever is installed beside pytest: JupyterLab with ipywidgets 8 (`tests/browser.txt`) or Notebook 6.5.7
with ipywidgets 7.7.1, Colab's own. Not run unless asked for: `python -m pytest -m browser -s`. SRGAN_SCREENSHOTS names a
folder to keep a screenshot of each step in.
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
import zipfile
from functools import cache, partial
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
FORMS = {"01_data": {"source": "synthetic", "limit": FEW_FACES}, "02_model": {"source": "synthetic"},
         "03_train": {"source": "synthetic", "images": FEW_FACES, "minutes": 0.5}, "04_compare": {"source": "synthetic"}}

SCREEN = {"width": 1280, "height": 1400}
OUTPUT = ".jp-OutputArea-output" if LAB else ".output_subarea"
PANEL = f"{OUTPUT} .widget-vbox"

CELLS = "jupyterapp.shell.currentWidget.content.widgets" if LAB else "Jupyter.notebook.get_cells()"
SOURCE = "c.model.sharedModel.source" if LAB else "c.get_text()"  # of cell c
NODE = f"{CELLS}[number].node" if LAB else f"{CELLS}[number].element[0]"

# How far Run all has come: the smallest execution count of a code cell, 0 while one has not run
EXECUTED = f"() => Math.min(...{CELLS}"
EXECUTED += (".filter(c => c.model.type == 'code').map(c => c.model.executionCount || 0))" if LAB else
             ".filter(c => c.cell_type == 'code').map(c => c.input_prompt_number > 0 ? c.input_prompt_number : 0))")
LAST_EXECUTED = EXECUTED.replace("Math.min", "Math.max")
CONNECTED = ("() => window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel?.status == 'idle'" if LAB else
             "() => window.Jupyter?.notebook?._fully_loaded && Jupyter.notebook.kernel?.is_connected()")
# What changes with any picture on the page, and with those of the panel
PICTURES = """() => [...document.querySelectorAll('%s img')].filter(i => i.offsetParent).map(i => {
    const at = i.src.length >> 1; return i.src.length + i.src.slice(at, at + 80) + i.src.slice(-200, -20)}).join()"""
PICTURES, SHOWN = PICTURES % OUTPUT, PICTURES % PANEL
OUTPUTS = "c.model.outputs?.toJSON()" if LAB else "c.output_area?.outputs"
FAILED = f"() => {CELLS}.flatMap(c => {OUTPUTS} || [])"
FAILED += ".filter(output => output.output_type == 'error').map(output => output.evalue)"
STATUS = ("() => [...document.querySelectorAll('%s [role=status], %s [role=timer]')].map(e => e.innerText).join(' ')"
          % (OUTPUT, OUTPUT))
CUT = """e => [...e.parentNode.querySelectorAll('*')].map(
    each => getComputedStyle(each).clipPath).filter(path => path != 'none').join()"""


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
        if stem == "01_data":  # with a form that asks for photos of one's own, down to what was accepted
            fill_in(notebook, source="upload")
            last = next(i for i, cell in enumerate(notebook.cells) if "contact_sheet" in cell.source)
            notebook.cells = notebook.cells[:last + 1]
            nbformat.write(notebook, folder / "notebooks" / "01_upload.ipynb")


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
               f"--port={port}", f"--{'IdentityProvider' if LAB else 'NotebookApp'}.token={token}"]
    command += ["--LabApp.expose_app_in_browser=True"] * LAB
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
        self.page.wait_for_function(f"before => ({EXECUTED})() > before || ({FAILED})().length", arg=before,
                                    timeout=PATIENCE["Run all"])
        assert self.page.evaluate(FAILED) == []

    def run(self, code: str) -> None:
        """Run the cell with that code, as people do."""
        self.scroll_to(code)
        cell = self.page.locator(".jp-CodeCell, .code_cell").filter(has_text=code).first
        cell.locator(".cm-content, .CodeMirror").first.click()
        self.changes(lambda: self.page.keyboard.press("Shift+Enter"), LAST_EXECUTED)
        self.settled()

    def scroll_to(self, code: str) -> None:
        """To the cell with that code: JupyterLab takes what is far away from the page."""
        self.show(self.page.evaluate(f"code => {CELLS}.findIndex(c => {SOURCE}.includes(code))", code))

    def show(self, number: int) -> None:
        """Scroll to the cell of that number."""
        self.page.evaluate("number => jupyterapp.shell.currentWidget.content.scrollToItem(number, 'start')" if LAB else
                           "number => Jupyter.notebook.get_cell(number).element[0].scrollIntoView()", number)

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

    @property
    def status(self) -> str:
        return self.page.evaluate(STATUS)

    def changes(self, action, what: str = SHOWN) -> float:
        """Seconds from an action to what it changes."""
        before, began = self.page.evaluate(what), time.perf_counter()
        action()
        self.page.wait_for_function(f"before => ({what})() != before", arg=before, polling=50)
        return time.perf_counter() - began

    def settled(self) -> None:
        """Wait until all that was asked of the kernel is done."""
        self.page.wait_for_function(CONNECTED if LAB else "() => document.querySelector('.kernel_idle_icon')")

    def cut(self) -> str:
        """Where the before/after slider cuts its pictures."""
        return self.range.evaluate(CUT)

    def outputs(self):
        """Number and selector of each code cell's output in turn, which is brought onto the screen."""
        for number in self.page.evaluate(f"() => {CELLS}.flatMap((c, i) => {OUTPUTS}?.length ? [i] : [])"):
            where = f"[data-number='{number}'] {OUTPUT}"
            self.show(number)
            self.page.evaluate(f"number => {{ {NODE}.dataset.number = number }}", number)
            self.page.wait_for_selector(where, state="attached")
            yield number, where

    def finds(self, fault, picture=None, name: str = ""):
        """What `fault` finds in any output, with the cell's number; `picture` keeps each as a screenshot."""
        numbers = []
        for number, where in self.outputs():
            numbers.append(number)
            if picture:
                picture(f"{self.stem[:2]}-{name}-{number:02}")
            yield from ((number, each) for each in fault(self.page, where))
        assert len(numbers) > 8

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


# --- What may not be so for anybody


ROLES = "button|checkbox|combobox|group|img|link|progressbar|radio|slider|spinbutton|textbox"


def nameless(page, where: str) -> list[str]:
    """What a screen reader would call by its kind alone: controls and pictures without a name, as Chromium computes it."""
    found = "\n".join(part.aria_snapshot() for part in page.locator(where).all())
    silent = page.evaluate("where => [...document.querySelectorAll(`${where} img`)].filter(e => !e.alt.trim()).length", where)
    return [line for line in found.splitlines() if re.match(rf'\s*- ({ROLES})(?! ")', line)] + ["picture without text"] * silent


CONTROLS = """where => [...document.querySelectorAll(
    ['button', 'select', 'input[type=range]', '.noUi-handle', '.ui-slider-handle', 'a[href]']
    .map(kind => `${where} ${kind}`).join())].filter(e => e.offsetParent && !e.disabled)"""


def unreached(page, where: str) -> list[str]:
    """Controls that the Tab key, pressed from the first one on, does not come to."""
    count = page.evaluate(f"where => ({CONTROLS})(where).length", where)
    if count:
        page.evaluate(f"where => {{ window.reached = new Set(); ({CONTROLS})(where)[0].focus() }}", where)
    for _ in range(3 * count):
        page.evaluate("() => window.reached.add(document.activeElement)")
        page.keyboard.press("Tab")
    return page.evaluate(f"where => ({CONTROLS})(where).filter(e => !reached.has(e)).map(e => e.outerHTML.slice(0, 200))", where)


def outside(page, where: str) -> list:
    """What sticks out to the right, and by how many px, where nothing around it (of that output or the output itself) scrolls."""
    return page.evaluate("""where => [...document.querySelectorAll(where)].flatMap(part => {
        const text = e => e.outerHTML.slice(0, 150), edge = part.getBoundingClientRect().right;
        const scrolls = e => ['auto', 'scroll'].includes(getComputedStyle(e).overflowX);
        const kept = e => e != part && (scrolls(e.parentElement) || kept(e.parentElement));
        return [...part.querySelectorAll('*')].map(e => [e.getBoundingClientRect().right - edge, e])
            .filter(([by, e]) => by > 2 && e.offsetParent && !kept(e)).map(([by, e]) => [by, text(e)]) })""", where)


# What WCAG calls the contrast of each visible piece of text with what lies behind it
CONTRASTS = """where => {
    const parse = text => { const c = (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number); return c.length < 4 ? [...c, 1] : c };
    const over = (top, under) => top.slice(0, 3).map((c, i) => c * top[3] + under[i] * (1 - top[3]));
    const behind = e => e ? over(parse(getComputedStyle(e).backgroundColor), behind(e.parentElement)) : [255, 255, 255];
    const light = c => c.map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
    return [...document.querySelectorAll(`${where}, ${where} *`)].filter(e => e.offsetParent && [...e.childNodes].some(
        n => n.nodeType == 3 && n.data.trim()) && !['STYLE', 'SCRIPT', 'OPTION'].includes(e.tagName)
        && !e.disabled && !e.closest('code')).map(e => {
        const ground = behind(e), text = light(over(parse(getComputedStyle(e).color), ground)), back = light(ground);
        const contrast = (Math.max(text, back) + .05) / (Math.min(text, back) + .05);
        return [contrast, e.innerText.slice(0, 60), e.outerHTML.slice(0, 200)]})}"""


def faint(page, where: str) -> list:
    """Text whose contrast with what lies behind it is below the 4.5 of WCAG's level AA; the colours of code are Jupyter's own."""
    return [each for each in page.evaluate(CONTRASTS, where) if each[0] < 4.5]


# --- 04: the panel


def test_another_factor_is_another_picture(explorer, tmp_path):
    for factor in ("8x", "2x", "4x"):
        seconds = explorer.changes(explorer.button(factor, "Upscale factor").click)
        explorer.settled()
        assert f"enlarged {factor} by" in explorer.status
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
    explorer.handle("Face").scroll_into_view_if_needed()
    handle, track = explorer.handle("Face").bounding_box(), explorer.widget("Face").bounding_box()
    x, y = handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2

    def drag():
        explorer.page.mouse.move(x, y)
        explorer.page.mouse.down()
        explorer.page.mouse.move(x + track["width"] / 4, y, steps=5)
        explorer.page.mouse.up()

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
    explorer.page.wait_for_function(f"([e, before]) => ({CUT})(e) != before", arg=[explorer.range.element_handle(), before])
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


def test_a_button_is_pressed_by_the_keyboard(explorer):
    explorer.button("2x", "Upscale factor").focus()
    explorer.changes(lambda: explorer.page.keyboard.press("Space"))
    explorer.settled()


@pytest.mark.parametrize("moved", ["", "Zoom left"])
def test_a_click_into_a_picture_moves_the_enlarged_part(moved, explorer):
    if moved:  # and a second click at the same place brings it back
        explorer.changes(lambda: explorer.handle(moved).press("Home"))
        explorer.settled()
    picture = explorer.page.locator(f"{PANEL} figure img").first
    picture.scroll_into_view_if_needed()
    box = picture.bounding_box()
    explorer.changes(lambda: explorer.page.mouse.click(box["x"] + 0.75 * box["width"], box["y"] + 0.25 * box["height"]))
    explorer.settled()
    assert explorer.widget("Zoom left").locator(".widget-readout").inner_text() == "0.83"  # (0.75 - 1/8) / (3/4)


def test_the_cut_stays_where_it_is_from_face_to_face(explorer):
    explorer.range.focus()
    for _ in range(7):
        explorer.page.keyboard.press("ArrowLeft")
    at = explorer.range.input_value()
    explorer.changes(explorer.button("Next face").click)
    explorer.settled()
    assert explorer.range.input_value() == at != "50" and f"{100 - int(at)}%" in explorer.cut()


def test_what_the_panel_tells_a_screen_reader(explorer):
    """Names, values and states as they are shown, after changes by others than the control itself, too."""
    panel = explorer.page.locator(PANEL).first
    explorer.changes(lambda: explorer.handle("Zoom left").press("ArrowRight"))
    explorer.changes(explorer.widget("Before/after").get_by_role("button").first.click)
    explorer.changes(explorer.button("Next face").click)
    explorer.settled()
    sliders = [each for each in panel.get_by_role("slider").all() if each.get_attribute("type") != "range"]
    names = {each.get_attribute("aria-label") for each in sliders}
    assert {"Face", "Faithful to sharp", "Zoom left", "Zoom top"} <= names
    for each in sliders:
        shown = explorer.widget(each.get_attribute("aria-label")).locator(".widget-readout").inner_text()
        assert each.get_attribute("aria-valuetext") == shown
    for label in ("Upscale factor", "Picture", "Before/after"):
        choices = panel.get_by_role("group", name=label).get_by_role("button").all()
        pressed = [each.get_attribute("aria-pressed") == "true" for each in choices]
        assert pressed == ["mod-active" in each.get_attribute("class") for each in choices] and sum(pressed) == 1
    assert panel.get_by_role("status").inner_text() == explorer.status != ""


def test_save_writes_a_file(explorer, tmp_path):
    def saved():
        return {path: path.stat().st_mtime_ns for path in explorer.folder.rglob("srgan-work/**/*.png")}

    before = saved()
    explorer.changes(explorer.button("Save figure").click, STATUS)
    explorer.settled()
    new = [path for path, when in saved().items() if before.get(path) != when]
    assert new and all(Image.open(path).width > 300 for path in new)
    assert any(path.name in explorer.status for path in new), explorer.status
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


# --- 03: stop, reload, continue


def steps(folder: Path) -> list[int]:
    (history,) = folder.glob("notebooks/srgan-work/runs/*/history.csv")
    return [int(line.split(",")[0]) for line in history.read_text().splitlines()[1:]]


def test_training_stopped_and_run_again_after_a_reload_continues(browser, server, tmp_path):
    person = Person(browser, server, "03_train")
    person.press_run_all()
    stop = person.find("Dashboard(", person.button("Stop and save"), PATIENCE["Run all"])
    person.page.wait_for_function(f"() => /update [1-9]/.test(({STATUS})())")
    stop.scroll_into_view_if_needed()
    person.picture("03-training", tmp_path)
    assert nameless(person.page, PANEL) == unreached(person.page, PANEL) == faint(person.page, PANEL) == []
    began = time.perf_counter()
    stop.press("Enter")
    person.page.wait_for_function(f"() => /Stopped at update/.test(({STATUS})())")
    print(f"{NAME}: stopped {time.perf_counter() - began:.2f} s after the button")
    person.page.wait_for_function(f"() => ({EXECUTED})() > 0", timeout=PATIENCE["Run all"])
    person.picture("03-stopped", tmp_path)
    numbers = re.search(r"update ([\d,]+) of ([\d,]+)", person.status).groups()
    kept, total = (int(number.replace(",", "")) for number in numbers)
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


# --- For everybody, in all notebooks


@pytest.fixture(scope="module")
def opened(browser, server):
    @cache
    def open_and_run(stem: str) -> Person:
        person = Person(browser, server, stem)
        person.run_all()
        print(f"\n{NAME}: {stem}, Run all done {time.time() - person.opened:.1f} s after opening")
        return person

    return open_and_run


@pytest.fixture(params=["04_compare", "01_data", "02_model", "03_train"])
def reader(request, opened):
    """Somebody who opened a notebook and pressed Run all: each once for all that follows."""
    return request.getfixturevalue("explorer") if request.param == "04_compare" else opened(request.param)


def test_every_control_and_every_picture_has_a_name(reader):
    assert list(reader.finds(nameless)) == []


def test_every_control_is_reached_by_the_tab_key(reader):
    assert list(reader.finds(unreached)) == []
    if reader.stem == "04_compare":
        assert reader.page.evaluate(f"where => ({CONTROLS})(where).length", PANEL) > 10


def test_legible_at_twice_the_size(reader, tmp_path):
    """As zoom by the browser does: half as many px, each twice as large."""
    reader.page.set_viewport_size({side: px // 2 for side, px in SCREEN.items()})
    try:
        assert list(reader.finds(outside, partial(reader.picture, folder=tmp_path), "zoom")) == []
    finally:
        reader.page.set_viewport_size(SCREEN)


if LAB:  # Notebook 6 has no dark theme
    @contextlib.contextmanager
    def dark(page):
        def change(theme: str, light: str) -> None:
            page.evaluate("theme => jupyterapp.commands.execute('apputils:change-theme', {theme})", theme)
            page.wait_for_selector(f"body[data-jp-theme-light={light}]", state="attached")
            page.wait_for_selector("#jupyterlab-splash", state="detached")  # which dims all below it

        change("JupyterLab Dark", "false")
        try:
            yield
        finally:
            change("JupyterLab Light", "true")

    def test_legible_in_the_dark_theme(reader, tmp_path):
        with dark(reader.page):
            assert list(reader.finds(faint, partial(reader.picture, folder=tmp_path), "dark")) == []
            assert reader.page.evaluate(CONTRASTS, PANEL if reader.stem == "04_compare" else OUTPUT)


@pytest.mark.parametrize("reader", ["01_data"], indirect=True)
@pytest.mark.parametrize("how", ["keys", "mouse"])
def test_the_factor_slider_of_01_moves_the_picture(how, reader, tmp_path):
    slider = reader.find("picture_slider(", reader.page.get_by_role("slider", name="Upscale factor"))
    box = slider.bounding_box()
    for key, share, factor in (("End", 0.98, "8x"), ("Home", 0.02, "2x"), ("ArrowRight", 0.5, "4x")):
        if how == "keys":
            slider.press(key)
        else:
            reader.page.mouse.click(box["x"] + share * box["width"], box["y"] + box["height"] / 2)
        assert slider.get_attribute("aria-valuetext") == factor
        shown = [each.get_attribute("alt") for each in reader.page.locator("[data-name] img").all() if each.is_visible()]
        assert len(shown) == 1 and f"LR at {factor}" in shown[0]
        reader.picture(f"01-slider-{factor}", tmp_path)


@pytest.mark.parametrize("reader", ["02_model"], indirect=True)
def test_an_answer_of_02_is_hidden_until_asked_for(reader, tmp_path):
    reader.scroll_to("my_parameters, my_multiplications = None, None")
    answer = reader.page.locator("details").first
    assert not answer.get_by_text("15,616 parameters").is_visible()
    summary = answer.locator("summary")
    summary.press("Enter") if LAB else summary.click()  # Notebook 6 takes the key for its own: "edit this cell"
    assert answer.get_by_text("15,616 parameters").is_visible()
    reader.picture("02-answer", tmp_path)


def test_photos_of_ones_own_become_a_store(browser, server, tmp_path):
    """01 with *upload*: Run all goes on with drawn faces; the photos are chosen, and the next cells run again."""
    person = Person(browser, server, "01_upload")
    person.run_all()
    assert "Drawn faces stand in" in person.page.locator(OUTPUT).filter(has_text="Drawn faces").inner_text()
    photos = [tmp_path / f"photo {number}.png" for number in range(3)]
    for number, photo in enumerate(photos):
        Image.effect_noise((200, 240), 60 + number).convert("RGB").save(photo)
    button = person.find("upload_images(", person.button("Choose photos"))
    assert nameless(person.page, OUTPUT) == []
    with person.page.expect_file_chooser() as chooser:
        button.click()
    chooser.value.set_files(photos)
    person.page.wait_for_function("() => [...document.querySelectorAll('button')].some(e => /\\(3\\)/.test(e.innerText))")
    person.settled()
    person.picture("01-upload", tmp_path)
    person.run("store = srgan.prepare_faces(source")
    person.run("srgan.contact_sheet(store)")
    sheet = person.find("srgan.contact_sheet(store)", person.page.locator(OUTPUT).filter(has_text="3 accepted"))
    assert all(photo.name in sheet.inner_text() for photo in photos)
    person.picture("01-uploaded", tmp_path)
    person.page.context.close()
