"""`optimum-cli export cushion`: `cushion-deploy build` among the exports of optimum.

Installed as ``optimum/commands/register/register_cushion.py`` (``package-dir`` in pyproject.toml): optimum-cli imports
every file of that folder, whatever distribution it comes with, and registers its commands. `optimum` is a namespace
package (PEP 420), so this folder has no ``__init__.py``.
"""

from __future__ import annotations

from argparse import REMAINDER, ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class CushionExportCommand(BaseOptimumCLICommand):  # type: ignore[misc]
    """Export a model as a static INT8 bundle."""

    COMMAND = CommandInfo("cushion", help="Export a language model as a static INT8 bundle with a CushionCache prefix.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the arguments that every export of optimum has; all others are those of `cushion-deploy build`."""
        parser.add_argument("-m", "--model", help="GGUF file, Hugging Face folder, or hub id (org/name).")
        parser.add_argument("output", help="Folder of the bundle.")
        parser.add_argument(
            "options", nargs=REMAINDER, help="After OUTPUT, any option of `cushion-deploy build`; see its --help."
        )

    def run(self) -> None:
        """Build the bundle and exit with the exit code of `cushion-deploy build`."""
        # Imported here, so that the other commands of optimum-cli do not load it.
        from cushion_deploy.cli.main import main

        model = ["--model", self.args.model] if self.args.model else []
        main(["build", *model, "--output", self.args.output, *self.args.options])


REGISTER_COMMANDS = [(CushionExportCommand, ExportCommand)]
