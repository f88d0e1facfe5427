"""`python -m qcompile` is `python -m qcompile.compiler.cli`: the command line."""

import runpy

if __name__ == "__main__":
    runpy.run_module("qcompile.compiler.cli", run_name="__main__")
