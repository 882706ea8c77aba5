"""The command `fastbert`: one module a subcommand, each with a `main(argv)` that scripts/ call too."""
