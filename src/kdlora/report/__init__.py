"""What a person reads: the report, the tables of a suite and of a search, the model card."""
