"""How many planted faults the tests catch: mutants of passes/, each against the tests that run its line."""
