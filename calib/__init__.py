"""Calibration of static scales: corpora, observers, range estimators, smoothing."""

if __name__ != "cushion_deploy.calib":
    raise ImportError("import this package as 'cushion_deploy.calib'; the folder 'calib' is only its location on disk")
