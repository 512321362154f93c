"""Arms x seeds on one task: the only room that knows the whole way."""
