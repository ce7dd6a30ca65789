"""The command line: one file a verb. Results on stdout, progress and words on stderr, stable exit codes."""
