"""`python -m cushion_deploy` is the command line."""

from cushion_deploy.cli.main import main

main()
