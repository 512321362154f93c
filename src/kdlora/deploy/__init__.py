"""Ship a classifier: ONNX and int8 with parity gates, prediction, benchmark, calibration."""
