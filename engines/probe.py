"""Import a library and list the GPUs in a child process, because a fault of a driver ends the process.

The devices are read from the driver, ``libcuda.so.1``, through ctypes: cuda-bindings is needed to run a plan and is not
installed where plans are only compiled, and four calls of the driver API do not justify another package.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cushion_deploy

TIMEOUT_SECONDS = 120.0
_MAJOR, _MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of cuda.h."""
_REPLY = "probe: "


@dataclass(frozen=True)
class Probe:
    """What a child process found about a library.

    Attributes:
        module: name of the module.
        version: its ``__version__``; empty if it cannot be imported.
        gpus: NVIDIA GPUs of the driver, such as ``sm86 NVIDIA GeForce RTX 3090``; empty without a driver.
        problem: why the import failed; empty if it did not.
    """

    module: str
    version: str = ""
    gpus: tuple[str, ...] = ()
    problem: str = ""

    @property
    def importable(self) -> bool:
        """Whether the library was imported."""
        return bool(self.version)


@functools.cache
def probe(module: str) -> Probe:
    """Probe a module, once per process.

    Nothing is raised: that a library crashes, hangs or is absent is a result.
    """
    return run_probe(module)


def run_probe(module: str, timeout: float = TIMEOUT_SECONDS) -> Probe:
    """Import ``module`` in a child process and list the GPUs there.

    Args:
        module: name of the module.
        timeout: seconds until the child is killed.
    """
    command = [sys.executable, "-m", "cushion_deploy.engines.probe", module]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            cwd=package_root(),
            env=child_environment(),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Probe(module, problem=f"importing {module} took longer than {timeout:.0f} s")
    for line in done.stdout.splitlines():
        if line.startswith(_REPLY):
            found = json.loads(line[len(_REPLY) :])
            return Probe(**{**found, "gpus": tuple(found["gpus"])})
    return Probe(module, problem=f"importing {module} ended the process ({how_it_ended(done.returncode)})")


def how_it_ended(returncode: int) -> str:
    """Return an exit status in words, a signal by its name."""
    if returncode >= 0:
        return f"exit code {returncode}"
    try:
        return signal.Signals(-returncode).name
    except ValueError:
        return f"signal {-returncode}"


def package_root() -> Path:
    """Return the folder that holds cushion_deploy.

    Child processes run in it: ``python -m`` imports from the working folder first, and the user's may hold anything.
    """
    return Path(cushion_deploy.__file__).resolve().parents[1]


def child_environment() -> dict[str, str]:
    """Return the environment in which a child process imports this same cushion_deploy."""
    paths = [str(package_root()), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def cuda_devices(library: str = "libcuda.so.1") -> tuple[str, ...]:
    """Return the GPUs of the driver as ``sm<major><minor> <name>``; empty if there is no driver."""
    try:
        cuda: Any = ctypes.CDLL(library)
    except OSError:
        return ()
    count = ctypes.c_int(0)
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    return tuple(_describe(cuda, index) for index in range(count.value))


def _describe(cuda: Any, index: int) -> str:
    device, name = ctypes.c_int(0), ctypes.create_string_buffer(128)
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    numbers = []
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int(0)
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        numbers.append(str(value.value))
    return f"sm{''.join(numbers)} {name.value.decode(errors='replace')}"


def _answer(module: str) -> Probe:
    """Probe a module in this process, the child."""
    try:
        version = str(importlib.import_module(module).__version__)
    except Exception as e:  # whatever the library raises on import is the result
        return Probe(module, problem=f"{type(e).__name__}: {e}")
    return Probe(module, version, cuda_devices())


if __name__ == "__main__":
    print(_REPLY + json.dumps(asdict(_answer(sys.argv[1]))), flush=True)
    # Some driver libraries crash while they unload, after the reply has been sent.
    os._exit(0)
