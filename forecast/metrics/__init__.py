"""Scores: states that add up over batches, blocks and processes, and the pure functions that read scores off them."""
