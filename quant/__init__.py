"""Quantization: the NF4 and int8 formats, the export artifact, and the one place that picks a
matmul backend."""
