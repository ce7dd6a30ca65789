"""The commands to try after a build, as they can be typed here."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

NAME = "cushion-deploy"


def program() -> str:
    """Return how this program is called here: by name if the shell finds it, else as it was called."""
    called, found = Path(sys.argv[0]), shutil.which(NAME)
    # Another installation may be the one that the shell finds.
    if found and Path(found).parent.resolve() == Path(sys.executable).parent.absolute().resolve():
        return NAME
    return shlex.quote(str(called)) if called.stem == NAME else "python -m cushion_deploy"


def after_build(bundle: Path, model: str, *, passed: bool) -> list[str]:
    """Return the next three commands as lines: to use a bundle, or to find out why its checks fail."""
    out = shlex.quote(str(bundle))
    if not passed:
        return _lines(
            ("report", out, "what was measured, and every check that fails"),
            ("parity", out, "climb the ladder again, with the first diverging Site"),
            ("doctor", shlex.quote(model), "which Sites cost most, and what each remedy removes"),
        )
    chats = (bundle / "chat_template.jinja").is_file()
    serve = "a chat page, and the OpenAI API"
    if find_spec("fastapi") is None:
        serve += f" (after pip install '{NAME}[serve]')"
    return _lines(
        ("chat", out, "talk with it") if chats else ("generate", f'{out} "Once upon a time"', "let it write"),
        ("serve", out, serve),
        ("bench", out, "its speed on this machine, beside floating point"),
    )


def _lines(*steps: Sequence[str]) -> list[str]:
    commands = [f"{program()} {verb} {what}" for verb, what, _ in steps]
    width = max(map(len, commands))
    return [f"  {command:<{width}}  {why}" for command, (_, _, why) in zip(commands, steps, strict=True)]
