"""Evidence: metrics, measurements, run records, statistics and the report."""
