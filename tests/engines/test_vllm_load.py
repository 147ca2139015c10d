"""`make serve ENGINE=vllm` under load: the experiment of `make reliability-serving` at a smaller size."""

import os

import pytest

from support import load
from support.openai_server import VLLM_ENVIRONMENT, server_of


pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]


def test_under_load(tiny_dir, tiny_model, tiny_tokenizer, tmp_path):
    """16 clients get the answers of one, whatever the others do; and SIGTERM lets waiting clients have theirs.

    Too short to measure memory growth: `make reliability-serving` does.
    """
    log, requests = tmp_path / "log.txt", load.requests_of(tiny_tokenizer, 20)
    with server_of(load.command_of(tiny_dir), log, 240, os.environ | VLLM_ENVIRONMENT) as (server, url):
        clients = load.Clients(url, tiny_dir.name, requests)
        clients.ask_alone()
        answers = [answer.ids for answer in clients.expected]
        assert answers == [load.greedy(tiny_model, request) for request in requests]

        outcome = clients.load(16, 10)
        assert not outcome.failures and not outcome.different, outcome
        assert outcome.equal > 50 and len(outcome.dropped) == 2 and len(outcome.refused) > 5, outcome
        assert set(clients.left().values()) == {0.0}

        # A wrong answer would be noticed: here, that to another request.
        clients.expected[-1], clients.expected[-2] = clients.expected[-2:]
        wrong = clients.load(16, 4).different
        assert wrong and {number for number, _ in wrong} <= {18, 19}
        number, answer = wrong[0]
        assert "has the logit" in load.distance(tiny_model, requests[number], answer.ids, clients.expected[number].ids)

        assert "Traceback" not in log.read_text()  # vLLM may log one after the last answer, when its engine has ended
        ending = clients.terminate(server, 16)
        assert ending.seen == {"as alone": 16} and ending.code == 0 and not ending.left, ending
        assert ending.seconds < load.STOPPED, ending
