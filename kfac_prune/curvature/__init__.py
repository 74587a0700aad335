"""From a model and calibration windows to Kronecker factors."""
