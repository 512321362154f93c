"""From raw text to canonical data sets, and from those to batches."""
