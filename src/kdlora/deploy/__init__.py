"""Ship a classifier: ONNX and int8 with parity gates, prediction, benchmark, calibration."""

from typing import Literal

Runtime = Literal["auto", "onnxruntime", "openvino"]
"""What runs an exported file; here, where the command line has it without NumPy."""
