"""The verbs of the command line as functions, above the stages that most of them run."""
