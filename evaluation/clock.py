"""How long the rest of an evaluation takes, reckoned from how long each kind of request has taken so far."""

# A generated token costs a decoding step, a character of the prompt its small share of one prefill. Only the length of
# the bar rests on this guess: the time left comes from each kind's own measured pace.
CHARACTERS_PER_NEW_TOKEN = 100


def work_of(kind: str, request: tuple) -> float:
    """The size of one request in characters: prompt and continuation, or prompt and the most it may generate."""
    if kind == "generate_until":
        return len(request[0]) + CHARACTERS_PER_NEW_TOKEN * request[1].get("max_gen_toks", 256)
    return sum(map(len, request))


class Clock:
    """Work that waits, by task and by kind of request, and the pace of each kind."""

    def __init__(self) -> None:
        self._waiting: dict[str, dict[str, float]] = {}  # task -> kind -> characters
        self._pace: dict[str, tuple[float, float]] = {}  # kind -> characters answered, seconds it took

    def plan(self, task: str, kind: str, work: float) -> None:
        kinds = self._waiting.setdefault(task, {})
        kinds[kind] = kinds.get(kind, 0.0) + work

    def answered(self, task: str, kind: str, work: float, seconds: float) -> None:
        kinds = self._waiting[task]
        kinds[kind] = max(0.0, kinds.get(kind, 0.0) - work)
        done, took = self._pace.get(kind, (0.0, 0.0))
        self._pace[kind] = (done + work, took + seconds)

    def finished(self, task: str) -> None:
        """Nothing of this task waits any more, whatever had been planned for it."""
        self._waiting.pop(task, None)

    def work_left(self) -> float:
        return sum(work for kinds in self._waiting.values() for work in kinds.values())

    def seconds_left(self) -> float | None:
        """None until something was measured; a kind not measured yet is taken to be as slow as the slowest."""
        speeds = {kind: seconds / work for kind, (work, seconds) in self._pace.items() if work}
        if not speeds:
            return None
        slowest = max(speeds.values())
        return sum(
            work * speeds.get(kind, slowest) for kinds in self._waiting.values() for kind, work in kinds.items()
        )


def spoken(seconds: float | None) -> str:
    """A span of time as one would say it: about 40 s, about 12 min, about 3 h 20 min."""
    if seconds is None:
        return "time left not known yet"
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"about {round(seconds)} s left"
    return f"about {minutes} min left" if minutes < 90 else f"about {minutes // 60} h {minutes % 60} min left"
