"""Beyond one experiment: suites of runs, search, labelling; each carried out by an engine that exists."""
