"""Codes of experts: levels, scales, their encoders, and the weight that they make."""
