"""Trainable gates: their function and cost, where they stand in a graph, and how they learn."""
