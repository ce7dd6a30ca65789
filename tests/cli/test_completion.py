"""Completion: names of commands, options and files, and quickly; the scripts of the shells run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.shell_completion import CompletionItem, ShellComplete, get_completion_class

from cushion_deploy.cli.completion import NAME, SHELLS, VARIABLE
from cushion_deploy.cli.main import VERBS, cli


def complete(*words: str) -> list[CompletionItem]:
    """Complete the last of the words, as click does for a shell."""
    return ShellComplete(cli, {}, NAME, VARIABLE).get_completions(list(words[:-1]), words[-1])


def values(*words: str) -> set[str]:
    return {item.value for item in complete(*words)}


def test_an_empty_word_completes_to_every_command_with_its_help() -> None:
    assert {item.value: item.help for item in complete("")} == VERBS


def test_the_beginning_of_a_command_completes() -> None:
    assert values("ex") == {"export"}
    assert values("c") == {"calibrate", "chat", "clean", "completion"}
    assert values("nothing") == set()


def test_options_complete_before_and_behind_a_command() -> None:
    assert values("--v") == {"--version", "--verbose"}
    assert values("build", "--dry") == {"--dry-run"}
    assert "--output" in values("build", "--model", "x", "--o")


def test_values_complete() -> None:
    assert values("build", "--prefix", "a") == {"auto", "always"}
    assert values("completion", "") == set(SHELLS)
    assert [item.type for item in complete("serve", "")] == ["file"]


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_of_a_shell_is_printed_and_parses(shell: str, cli: Any, tmp_path: Path) -> None:
    program = shutil.which(shell)
    if shell == "bash" and program is None:
        pytest.skip("click asks bash for its version")
    done = cli("completion", shell)
    assert done.code == 0
    assert done.out.count(VARIABLE) >= 1
    assert get_completion_class(shell) is not None
    if program is None:
        return  # another shell than the ones of this machine
    (tmp_path / "script").write_text(done.out)
    checked = subprocess.run([program, "-n", str(tmp_path / "script")], capture_output=True, text=True, timeout=60)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_bash_completes(cli: Any, tmp_path: Path) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("bash is not installed")
    program = tmp_path / NAME
    program.write_text(f"#!{sys.executable}\nfrom cushion_deploy.cli.main import main\nmain()\n")
    program.chmod(0o755)
    (tmp_path / "script").write_text(cli("completion", "bash").out)
    asked = (
        f"source script; COMP_WORDS=({NAME} ins); COMP_CWORD=1; _cushion_deploy_completion {NAME} ins; "
        'echo "${COMPREPLY[@]}"'
    )
    path = os.pathsep.join(p for p in (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")) if p)
    environment = {**os.environ, "PYTHONPATH": path, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [bash, "--norc", "-c", asked], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout.split(), done.returncode) == (["inspect"], 0)


def test_an_unknown_shell_is_named(cli: Any) -> None:
    done = cli("completion", "tcsh")
    assert done.code == 2
    assert "'bash', 'zsh', 'fish'" in done.err
