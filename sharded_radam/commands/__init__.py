"""The topics of the command line, one module each."""
