"""The command line: its options, commands, progress, tables and exit codes."""
