"""The command line. `steer.cli.app` has the commands."""
