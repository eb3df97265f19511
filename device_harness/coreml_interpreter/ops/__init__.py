"""The MIL operations as functions, one file for each group."""
