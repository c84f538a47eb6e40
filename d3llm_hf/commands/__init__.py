"""The subcommands of `d3llm`: each module has `add_parser(subparsers)`, whose parser names `run(args)`."""
