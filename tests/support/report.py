"""What the reliability commands print."""


def check(line: str, passed: bool) -> bool:
    print(f"{'ok  ' if passed else 'FAIL'} {line}", flush=True)
    return passed
