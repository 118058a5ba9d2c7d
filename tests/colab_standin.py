"""A stand-in for the package `google.colab` and for a Colab machine, for tests.

It behaves as the real package does where the project meets it: which checks come first, what each failure raises (read from
googlecolab/colabtools of 2026-04-07). `start` makes this process look like Colab's kernel; the folder `Machine.content` then
stands for /content, and `Machine.cloud` for what the user keeps on Google Drive, which outlives the machine.
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


class TIMEOUT(Exception):
    """pexpect's: the mount waits for a line of the Drive program."""


class EOF(Exception):
    """pexpect's: the Drive program ended."""


# What `drive.mount` can raise, by what went wrong. The stages are in the order of the real function
REFUSED = {
    "not Colab's own machine": NotImplementedError("Mounting drive is unsupported in this environment. Use PyDrive instead."),
    "Colab Enterprise": NotImplementedError("google.colab.drive is not supported in Colab Enterprise."),
}
NO_CONSENT = {
    "consent denied": MessageError("Error: credential propagation was unsuccessful"),
    "third-party cookies blocked": MessageError("Error: credential propagation was unsuccessful"),
}
NOT_MOUNTED = {
    "consent timed out": ValueError("mount failed"),  # the time-out itself passes silently
    "root folder too large": ValueError("mount failed: timeout during initial read of root folder; for more info: "
                                        "https://research.google.com/colaboratory/faq.html#drive-timeout"),
    "domain policy": ValueError("/content\n: The domain policy has disabled Drive File Stream: "
                                "https://support.google.com/a/answer/7496409"),
    "Drive program hangs": TIMEOUT("Timeout exceeded.\n<pexpect.popen_spawn.PopenSpawn object at 0x7f>\n"),
    "Drive program ends": EOF("End Of File (EOF). Exception style platform."),
    "no credentials server": KeyError("TBE_EPHEM_CREDS_ADDR"),
}
SILENT = "mount says nothing, and nothing is there"
MOUNT_FAILURES = [*REFUSED, *NO_CONSENT, *NOT_MOUNTED, SILENT]


@dataclass
class Machine:
    """One virtual machine, its user and the user's Drive."""

    content: Path                                 # stands for /content
    cloud: Path                                   # stands for the user's "My Drive"
    failure: str = ""                             # what goes wrong at `drive.mount`: one of MOUNT_FAILURES
    chosen: dict[str, bytes] | str | None = None  # picked in the next dialog; "": cancelled; None: nobody is there to pick
    outputs_blocked: bool = False                 # by an extension of the browser, or its cookies settings
    consents: int = 0                             # how often the user was asked for access to Drive
    downloads: list[str] = field(default_factory=list)
    mounted: set[str] = field(default_factory=set)


def _drive(machine: Machine) -> ModuleType:
    drive = ModuleType("google.colab.drive")

    def mount(mountpoint: str) -> None:
        if machine.failure in REFUSED:
            raise REFUSED[machine.failure]
        if " " in mountpoint:
            raise ValueError("Mountpoint must not contain a space.")
        machine.consents += 1  # before it looks whether Drive is mounted already
        if machine.failure in NO_CONSENT:
            raise NO_CONSENT[machine.failure]
        place = Path(mountpoint)
        if (place / "My Drive").is_dir():
            print(f"Drive already mounted at {mountpoint}; to attempt to forcibly remount, call ...")
            return
        if place.is_symlink():
            raise ValueError("Mountpoint must not be a symlink")
        if place.is_dir() and any(place.iterdir()):
            raise ValueError("Mountpoint must not already contain files")
        if place.exists() and not place.is_dir():
            raise ValueError("Mountpoint must either be a directory or not exist")
        if not place.parent.exists():
            raise ValueError("Mountpoint must be in a directory that exists")
        if machine.failure in NOT_MOUNTED:
            raise NOT_MOUNTED[machine.failure]
        if machine.failure == SILENT:
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

    def unused(path: Path) -> Path:
        number, free = 0, path
        while free.exists():
            number += 1
            free = path.with_name(f"{path.stem} ({number}){path.suffix}")
        return free

    def upload(target_dir: str = "") -> dict[str, bytes]:
        if machine.outputs_blocked:
            raise MessageError("TypeError: Cannot read property '_uploadFiles' of undefined")
        if machine.chosen is None:
            raise AssertionError("files.upload waits for a person, for ever")
        saved = {}
        for name, data in (machine.chosen or {}).items():
            target = unused(Path(target_dir) / name)  # it never overwrites
            target.write_bytes(data)
            print(f"Saving {name} to {target}")
            saved[str(target)] = data
        machine.chosen = None
        return saved

    def download(filename: str) -> None:
        if not os.path.exists(filename):
            raise FileNotFoundError(f"Cannot find file: {filename}")
        if machine.outputs_blocked:
            raise MessageError("TypeError: Failed to fetch")
        machine.downloads.append(str(filename))

    files.upload, files.download = upload, download
    return files


def modules(machine: Machine) -> dict[str, ModuleType]:
    """What `import google.colab` finds on `machine`."""
    colab = ModuleType("google.colab")
    parts = [make(machine) for make in (_drive, _files)]
    for part in parts:
        setattr(colab, part.__name__.rpartition(".")[2], part)
    return {"google": ModuleType("google"), "google.colab": colab} | {part.__name__: part for part in parts}


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


def start(machine: Machine) -> None:
    """Turn this process, an IPython kernel, into Colab's kernel on `machine`; for good."""
    from IPython import get_ipython

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
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
import colab_standin
del sys.path[0]
colab_standin.start(colab_standin.Machine(Path({str(machine.content)!r}), Path({str(machine.cloud)!r})))
""")
    return {"IPYTHONDIR": str(profile)}


def copy_project(machine: Machine, project: Path, target: Path) -> None:
    """Copy `project` as it is, but that its module says `machine.content` where it says /content."""
    skip = shutil.ignore_patterns(".git", "srgan-work", "demo-out", "__pycache__", ".*cache")
    shutil.copytree(project, target, ignore=skip)
    module = target / "srgan_utils.py"
    module.write_text(module.read_text().replace('"/content', f'"{machine.content}'))
