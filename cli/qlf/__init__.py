"""The command line of qlformat. Each command parses, calls one function of the library, and prints."""
