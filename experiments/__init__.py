"""Command-line experiments on top of the library. Flags live only here."""
