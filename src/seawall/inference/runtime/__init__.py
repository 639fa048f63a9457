"""ONNX Runtime, hardened: telemetry off, threads sized to what the process may use, errors typed."""
