"""Runs a program with the reference operators, call by call, in bounded memory."""
