"""Fuzzing: models, data, recipes and tokenizers, damaged, through the command line: run.py, `make fuzz`."""
