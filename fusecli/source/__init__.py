"""What is fused: which tensors, under which names, in which class. Decided before anything looks at it."""
