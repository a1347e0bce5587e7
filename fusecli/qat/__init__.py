"""Fake quantization: observers, schemes, and modules that simulate a fold while they learn."""
