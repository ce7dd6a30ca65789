"""Compile a graph for a target, and read off the result how much of it runs in INT8."""

if __name__ != "cushion_deploy.engines":
    raise ImportError("import this package as 'cushion_deploy.engines': the folder 'engines' is only its place on disk")
