"""Each verb of the command line as one function; ``build`` is their composition."""
