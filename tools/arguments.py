"""Types of command-line arguments."""

import argparse


def positive(text: str) -> int:
    """A positive integer; `argparse` adds the option's name to the error."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)
