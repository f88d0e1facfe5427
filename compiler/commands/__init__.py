"""One module a subcommand of `qcompile`: `add_parser(subparsers)` and `run(args) -> int`."""
