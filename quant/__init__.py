"""Quantization: codecs and int8, the export, and the one place that picks a matmul backend."""
