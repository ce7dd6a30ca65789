"""`completion`: the script with which a shell completes commands, options and files."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from cushion_deploy.cli.help import verb
from cushion_deploy.errors import MissingDependency, UsageError

NAME, VARIABLE = "cushion-deploy", "_CUSHION_DEPLOY_COMPLETE"
"""Name of the program, and the variable through which the script asks it for completions."""
SHELLS = ("bash", "zsh", "fish")


@verb("completion")
@click.argument("shell", type=click.Choice(SHELLS))
def command(shell: str) -> None:
    """Print the script with which SHELL completes commands, options and file names.

    To install it, run one of these lines:

    \b
    bash  echo 'source <(cushion-deploy completion bash)' >> ~/.bashrc
    zsh   echo 'source <(cushion-deploy completion zsh)' >> ~/.zshrc
    fish  cushion-deploy completion fish > ~/.config/fish/completions/cushion-deploy.fish

    In ~/.zshrc, the line has to come after `compinit`. bash has to be version 4.4 or later.
    """  # noqa: D301 - click reads \b as: do not wrap this paragraph
    from cushion_deploy.cli.main import cli

    found = get_completion_class(shell)
    if found is None:
        raise UsageError(f"click has no completion for {shell}", hint=f"choose one of: {', '.join(SHELLS)}")
    try:
        click.echo(found(cli, {}, NAME, VARIABLE).source())
    except RuntimeError as e:
        # click asks bash for its version.
        raise MissingDependency(f"{shell} cannot complete: {e}", hint=f"install a newer {shell}") from e
