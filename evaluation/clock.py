"""Estimates the remaining time of an evaluation from the measured speed of each kind of request."""

# A generated token costs a decode step, a character of the prompt only a small share of one prefill. This estimate
# affects only the progress bar: the time left is computed from the measured speed of each kind.
CHARACTERS_PER_NEW_TOKEN = 100


def work_of(kind: str, request: tuple) -> float:
    """The size of a request in characters: prompt and continuation, or prompt and maximum generation length."""
    if kind == "generate_until":
        return len(request[0]) + CHARACTERS_PER_NEW_TOKEN * request[1].get("max_gen_toks", 256)
    return sum(map(len, request))


class Clock:
    """Pending work by task and kind of request, and the speed of each kind."""

    def __init__(self) -> None:
        self._pending: dict[str, dict[str, float]] = {}  # task -> kind -> characters
        self._speed: dict[str, tuple[float, float]] = {}  # kind -> characters answered, seconds taken
        self._running = ("", 0.0, 0.0)  # of a batch without answers so far: its kind, characters done, seconds taken

    def plan(self, task: str, kind: str, work: float) -> None:
        kinds = self._pending.setdefault(task, {})
        kinds[kind] = kinds.get(kind, 0.0) + work

    def running(self, kind: str, work: float, seconds: float) -> None:
        """How far the batch is that is running."""
        self._running = kind, work, seconds

    def answered(self, task: str, kind: str, work: float, seconds: float) -> None:
        kinds = self._pending[task]
        kinds[kind] = max(0.0, kinds.get(kind, 0.0) - work)
        done, took = self._speed.get(kind, (0.0, 0.0))
        self._speed[kind] = (done + work, took + seconds)
        self._running = ("", 0.0, 0.0)

    def finished(self, task: str) -> None:
        """Drop whatever is still pending for this task."""
        self._pending.pop(task, None)
        self._running = ("", 0.0, 0.0)

    def work_left(self) -> float:
        pending = sum(work for kinds in self._pending.values() for work in kinds.values())
        return max(0.0, pending - self._running[1])

    def seconds_left(self) -> float | None:
        """None until something was measured; a kind not measured yet is assumed to be as slow as the slowest."""
        running, running_work, running_seconds = self._running
        done, took = self._speed.get(running, (0.0, 0.0))
        measured = self._speed | {running: (done + running_work, took + running_seconds)}
        speeds = {kind: seconds / work for kind, (work, seconds) in measured.items() if work}
        if not speeds:
            return None
        slowest = max(speeds.values())
        pending = [(kind, work) for kinds in self._pending.values() for kind, work in kinds.items()]
        return sum(work * speeds.get(kind, slowest) for kind, work in pending) - running_work * speeds.get(
            running, 0.0
        )


def format_time_left(seconds: float | None) -> str:
    """A rounded duration: about 40 s, about 12 min, about 3 h 20 min."""
    if seconds is None:
        return "time left unknown"
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"about {round(seconds)} s left"
    return f"about {minutes} min left" if minutes < 90 else f"about {minutes // 60} h {minutes % 60} min left"
