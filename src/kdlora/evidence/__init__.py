"""Evidence: metrics, measurements, run records and statistics."""
