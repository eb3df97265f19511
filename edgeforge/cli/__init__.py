"""The command line: options, commands, progress, tables and exit codes."""
