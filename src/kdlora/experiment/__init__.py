"""Arms x seeds on one task: the only package that knows the whole way."""
