"""Speed and memory, measured: README.md has the rules of measurement."""
