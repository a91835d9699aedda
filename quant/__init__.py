"""Quantization: codecs and int8, the export artifact, and the one place that picks a
matmul backend."""
