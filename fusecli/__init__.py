"""Fold what is linear at inference into the layer beside it, and prove that nothing changed."""
