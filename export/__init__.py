"""Write the ONNX graph: family description + weights + prefix + scales in, a decoder with Q/DQ nodes out."""

if __name__ != "cushion_deploy.export":
    raise ImportError("import this package as 'cushion_deploy.export': the folder 'export' is only its place on disk")
