"""Graph rewriting passes: each a class with its parameters in the constructor, each leaving its decisions behind."""
