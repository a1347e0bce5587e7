"""Fake quantization while training: observers, schemes, and the modules that simulate a fold while they learn."""
