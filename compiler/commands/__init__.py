"""One module a subcommand of `qcompile`: its `Options`, declared, and `run(args) -> int`."""
