"""Download the C headers of ONNX Runtime from the npm package that has them, and check their digests. Stdlib only.

The wheel has the library without headers, and Debian has the headers since release 13 only. The package is ONNX Runtime
for Unity, whose frameworks for iOS come with the headers of ONNX Runtime 1.29 (MIT); nothing else of it is used, and
none of its code runs.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "com.github.asus4.onnxruntime@0.4.9"
FOLDER = "package/Plugins/iOS~/onnxruntime.xcframework/ios-arm64/onnxruntime.framework/Headers"
HEADERS = {
    "onnxruntime_c_api.h": "acc0cf4b3f28d39339c76770d76164bb7a0637dc89f5fde764b4017b632f6743",
    "onnxruntime_ep_c_api.h": "e6c986c9e98583f8113b2c6bc3864814883b806d501cf24da4d239c45753e235",
    "onnxruntime_error_code.h": "5ce3b054e798eced8d14f5b86e98692fd33470463f96194ce0700a2d53dd8721",
}


def main(target: Path) -> None:
    """Write the headers to the folder ``target``; ends with a message if that is not possible."""
    npm = shutil.which("npm")
    if npm is None:
        sys.exit("npm is not installed, so the headers of ONNX Runtime are not fetched")
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target) as name:
        pack = [npm, "pack", "--silent", "--ignore-scripts", PACKAGE]
        done = subprocess.run(pack, cwd=name, check=False, stdout=subprocess.DEVNULL)
        archives = list(Path(name).glob("*.tgz"))
        if done.returncode or len(archives) != 1:
            sys.exit(f"`{' '.join(pack)}` failed, so the headers of ONNX Runtime are not fetched")
        contents = read_headers(archives[0])
    for header, content in contents.items():
        (target / header).write_bytes(content)


def read_headers(archive: Path) -> dict[str, bytes]:
    """Return the headers in a package by name; exits with a message unless each has the expected SHA-256."""
    found: dict[str, bytes] = {}
    # Read as a stream: there are 150 MB before and behind them.
    with tarfile.open(archive, "r|gz") as package:
        for member in package:
            folder, _, name = member.name.rpartition("/")
            if folder == FOLDER and name in HEADERS and (source := package.extractfile(member)):
                found[name] = source.read()
            if len(found) == len(HEADERS):
                break
    for name, expected in HEADERS.items():
        digest = hashlib.sha256(found.get(name, b"")).hexdigest()
        if digest != expected:
            sys.exit(f"{name} of {PACKAGE} has SHA-256 {digest}, expected {expected}: not using it")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, help="folder to write them to")
    main(parser.parse_args().target)
