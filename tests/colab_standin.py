"""A stand-in for the package `google.colab` and for a Colab machine, for tests.

It behaves as the real package does where the project meets it: which checks come first, what each failure raises (read from
googlecolab/colabtools of 2026-04-07). `start` makes this process look like Colab's kernel.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType


class MessageError(Exception):
    """What the real package raises where the browser's side answers with an error."""


class PexpectError(Exception):
    """What waiting for a line of the Drive program raises."""


# What goes wrong at `drive.mount`: in which of its stages (they follow one another), and what it raises there
MOUNT_FAILURES = {
    "not Colab's own machine": ("start", NotImplementedError(
        "Mounting drive is unsupported in this environment. Use PyDrive instead.")),
    "consent denied": ("consent", MessageError("Error: credential propagation was unsuccessful")),  # or no third-party cookies
    "consent timed out": ("mount", ValueError("mount failed")),  # the time-out itself passes silently
    "domain policy": ("mount", ValueError("/content\n: The domain policy has disabled Drive File Stream: "
                                          "https://support.google.com/a/answer/7496409")),
    "Drive program hangs": ("mount", PexpectError("Timeout exceeded.\n<pexpect.popen_spawn.PopenSpawn object at 0x7f>\n")),
    "Drive program ends": ("mount", PexpectError("End Of File (EOF). Exception style platform.")),
    "no credentials server": ("mount", KeyError("TBE_EPHEM_CREDS_ADDR")),
    "mount says nothing, and nothing is there": ("mount", None),
}


@dataclass
class Machine:
    """One virtual machine, its user and the user's Drive."""

    content: Path                                 # stands for /content
    cloud: Path                                   # stands for the user's "My Drive", which outlives the machine
    failure: str = ""                             # what goes wrong at `drive.mount`: a name in MOUNT_FAILURES
    chosen: dict[str, bytes] | str | None = None  # picked in the next dialog; "": cancelled; None: nobody is there to pick
    outputs_blocked: bool = False                 # an extension of the browser lets nothing be downloaded
    consents: int = 0                             # how often the user was asked for access to Drive
    downloads: list[str] = field(default_factory=list)
    mounted: set[str] = field(default_factory=set)


def _drive(machine: Machine) -> ModuleType:
    drive = ModuleType("google.colab.drive")

    def mount(mountpoint: str) -> None:
        stage, error = MOUNT_FAILURES.get(machine.failure, ("", None))
        if stage == "start":
            raise error
        machine.consents += 1  # before it looks whether Drive is mounted already
        if stage == "consent":
            raise error
        place = Path(mountpoint)
        if (place / "My Drive").is_dir():
            print(f"Drive already mounted at {mountpoint}; to attempt to forcibly remount, call ...")
            return
        for wrong, must in ((place.is_symlink(), "not be a symlink"),
                            (place.is_dir() and any(place.iterdir()), "not already contain files"),
                            (place.exists() and not place.is_dir(), "either be a directory or not exist")):
            if wrong:
                raise ValueError(f"Mountpoint must {must}")
        if error:
            raise error
        if stage == "mount":
            return
        place.mkdir(exist_ok=True)
        machine.cloud.mkdir(parents=True, exist_ok=True)
        for name in ("MyDrive", "My Drive"):
            (place / name).symlink_to(machine.cloud)
        machine.mounted.add(os.path.abspath(mountpoint))
        print(f"Mounted at {mountpoint}")

    drive.mount = mount
    return drive


def _files(machine: Machine) -> ModuleType:
    files = ModuleType("google.colab.files")

    def upload(target_dir: str = "") -> dict[str, bytes]:
        if machine.chosen is None:
            raise AssertionError("files.upload waits for a person, for ever")
        saved = {}
        for name, data in (machine.chosen or {}).items():
            target, number = Path(target_dir) / name, 0
            while target.exists():  # it never overwrites
                number += 1
                target = (Path(target_dir) / name).with_stem(f"{Path(name).stem} ({number})")
            target.write_bytes(data)
            saved[str(target)] = data
        machine.chosen = None
        return saved

    def download(filename: str) -> None:
        if machine.outputs_blocked:
            raise MessageError("TypeError: Failed to fetch")
        machine.downloads.append(str(filename))

    files.upload, files.download = upload, download
    return files


def modules(machine: Machine) -> dict[str, ModuleType]:
    """What `import google.colab` finds on `machine`."""
    colab = ModuleType("google.colab")
    colab.drive, colab.files = _drive(machine), _files(machine)
    return {"google": ModuleType("google"), "google.colab": colab, "google.colab.drive": colab.drive,
            "google.colab.files": colab.files}


def ismount(machine: Machine, real: Callable = os.path.ismount) -> Callable:
    """`os.path.ismount` as it answers on `machine`."""
    return lambda path: os.path.abspath(path) in machine.mounted or real(path)


def shell_class(kind: type) -> type:
    """`kind` of shell under Colab's name, by which code tells where it runs (`str(get_ipython())`)."""
    return type("Shell", (kind,), {"__module__": "google.colab._shell"})


@contextlib.contextmanager
def sessions(answer: str, status: int = 200, seconds: float = 0) -> Iterator[dict[str, str]]:
    """Colab's list of open notebooks, `answer` after so many seconds: the environment that says where to ask."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            time.sleep(seconds)
            with contextlib.suppress(OSError):  # nobody waits any more
                self.send_response(status if self.path == "/api/sessions" else 404)
                self.end_headers()
                self.wfile.write(answer.encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield {"COLAB_JUPYTER_IP": "127.0.0.1", "KMP_TARGET_PORT": str(server.server_port), "no_proxy": "127.0.0.1"}
    finally:
        server.shutdown()
        server.server_close()


def start(content: str, cloud: str) -> None:
    """Turn this process, an IPython kernel, into Colab's kernel on such a machine; for good."""
    from IPython import get_ipython

    machine = Machine(Path(content), Path(cloud))
    shell = get_ipython()
    shell.__class__ = shell_class(type(shell))
    sys.modules.update(modules(machine))
    os.path.ismount = ismount(machine)


def start_in_kernels(machine: Machine, profile: Path) -> dict[str, str]:
    """The environment in which every new IPython kernel is one on `machine` from its first cell on."""
    startup = profile / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "00-colab.py").write_text(f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import colab_standin
del sys.path[0]
colab_standin.start({str(machine.content)!r}, {str(machine.cloud)!r})
""")
    return {"IPYTHONDIR": str(profile)}


def copy_project(project: Path, target: Path, content: Path | str = "/content") -> None:
    """Copy `project` as it is, but that its module says `content` where it says /content."""
    skip = shutil.ignore_patterns(".git", "srgan-work", "demo-out", "__pycache__", ".*cache")
    shutil.copytree(project, target, ignore=skip)
    module = target / "srgan_utils.py"
    module.write_text(module.read_text().replace('"/content', f'"{content}'))
