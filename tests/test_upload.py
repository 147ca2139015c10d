"""upload_to_hub.py with the real huggingface_hub, over real HTTP, against the Hub of tests/support/hub_server.py.

huggingface_hub reads HF_ENDPOINT when it is imported, so everything that contacts the Hub runs in separate processes:
the command line itself where a test kills or interrupts it, otherwise one worker that runs one command after another.
Everything runs twice: large files travel by Xet, as they do by default, and by LFS.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tools.convert.shards import write_shards
from tools.convert.tensors import Tensor
from tools.hub import errors
from tools.hub.assemble import SMALL_FILES

from support.hub_server import TOKEN, Dropped, Hold, Hub, User, answer, drop, environment, lose_answer, reply
from support.paths import ROOT, TINY


ASSEMBLE = ["--weights", str(TINY)]
QUICK = ["--no-verify-local", "--no-verify-remote"]  # without starting processes that load the model

WORKER = """
import contextlib, io, json, os, signal, sys
sys.path.insert(0, sys.argv[1])
from upload_to_hub import main
for line in sys.stdin:
    token, argv = json.loads(line)
    os.environ["HF_TOKEN"] = token
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            code = main(argv)
        except SystemExit as end:
            code = end.code
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    print(json.dumps([code, text.getvalue()]), flush=True)
"""

# What a user does with the line that the tool prints.
GENERATE = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
source = {"revision": sys.argv[2], "trust_remote_code": True}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **source, dtype="auto", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], **source)
ids = model.generate(**tokenizer("Coming to", return_tensors="pt"), max_new_tokens=8, do_sample=False)
generator = pipeline("text-generation", sys.argv[1], **source)
chat = generator([{"role": "user", "content": "Hello!"}], max_new_tokens=8, do_sample=False)
print(json.dumps([tokenizer.decode(ids[0]), chat[0]["generated_text"][-1]["content"]]))
"""


SENT = {"lfs": ("PUT", "/lfs/"), "xet": ("POST", "/v1/xorbs/")}  # the requests that carry large files


def start(settings: dict[str, str], *argv: object) -> subprocess.Popen:
    """Start the command line in a separate process."""
    command = [sys.executable, str(ROOT / "upload_to_hub.py"), *map(str, argv)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "encoding": "utf-8"}
    return subprocess.Popen(command, env=settings, **pipes)


class Worker:
    """A process that runs any number of command lines, so that imports are paid for once."""

    def __init__(self, settings: dict[str, str]) -> None:
        command = [sys.executable, "-c", WORKER, str(ROOT)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "encoding": "utf-8"}
        self.process = subprocess.Popen(command, env=settings, **pipes)

    def send(self, *argv: object, token: str = TOKEN) -> None:
        self.process.stdin.write(json.dumps([token, [*map(str, argv)]]) + "\n")
        self.process.stdin.flush()

    def receive(self) -> tuple[int, str]:
        """Exit code and everything that was printed."""
        code, text = json.loads(self.process.stdout.readline())
        assert TOKEN not in text
        return code, text

    def run(self, *argv: object, token: str = TOKEN) -> tuple[int, str]:
        self.send(*argv, token=token)
        return self.receive()

    def close(self) -> None:
        self.process.communicate()  # reads unread output: a full pipe would block the process


@pytest.fixture(scope="module", params=["xet", "lfs"])
def transfer(request: pytest.FixtureRequest) -> str:
    """How large files travel."""
    return request.param


@pytest.fixture(scope="module")
def hub(transfer: str) -> Iterator[Hub]:
    with Hub(part_bytes=500_000) as hub:
        hub.users[TOKEN] = User("user", organisations=("club",))
        hub.users["hf_reader"] = User("reader", role="read")
        yield hub


@pytest.fixture(scope="module")
def home(transfer: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HF_HOME of the processes: no token file, an empty cache."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def settings(hub: Hub, home: Path, transfer: str) -> dict[str, str]:
    """The environment of the processes."""
    return environment(hub, home, transfer)


@pytest.fixture(scope="module")
def folder(transfer: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that all runs assemble; later runs find it complete."""
    return tmp_path_factory.mktemp("upload") / "internlm-tiny"


@pytest.fixture(scope="module")
def unreachable(folder: Path, home: Path, transfer: str) -> Iterator[tuple[Hub, Worker]]:
    """A run against a Hub that drops every file, started now and checked last: the client gives up within a minute."""
    with Hub() as hub:
        hub.users[TOKEN] = User("user")
        hub.on(*SENT[transfer], drop(after=100_000), times=1000)
        worker = Worker(environment(hub, home, transfer))
        worker.send(*ASSEMBLE, "--local-dir", folder.with_name("dropped"), "--repo-id", "user/dropped", *QUICK)
        yield hub, worker
        worker.close()


@pytest.fixture(scope="module")
def uploaded(hub: Hub, settings: dict[str, str], folder: Path, unreachable: object) -> SimpleNamespace:
    """checkpoints/tiny uploaded as by a user, with every check."""
    hub.log.clear()
    hub.objects.clear()  # a test that ran before may have sent the same weights
    process = start(settings, *ASSEMBLE, "--local-dir", folder, "--repo-id", "user/internlm-tiny")
    text, _ = process.communicate()
    files = {path.name: path.read_bytes() for path in folder.iterdir()}  # later runs write another card
    return SimpleNamespace(code=process.returncode, text=text, log=list(hub.log), files=files)


@pytest.fixture(scope="module")
def worker(settings: dict[str, str], uploaded: object) -> Iterator[Worker]:
    worker = Worker(settings)
    yield worker
    worker.close()


@pytest.fixture
def quiet_hub(hub: Hub) -> Iterator[Hub]:
    """The Hub with an empty log; faults that a test adds are removed after it."""
    hub.log.clear()
    yield hub
    hub.faults.clear()


def head(hub: Hub, repo_id: str, revision: str = "main") -> str:
    return hub.repositories[repo_id].heads[revision]


# Complete uploads


def test_one_command_uploads_a_verified_private_repository(hub: Hub, uploaded: SimpleNamespace, transfer: str) -> None:
    """The commit holds exactly the assembled files, and loads; LFS sends large ones in several parts."""
    assert uploaded.code == 0, uploaded.text
    assert TOKEN not in uploaded.text
    commit = head(hub, "user/internlm-tiny")
    assert f'from_pretrained("user/internlm-tiny", revision="{commit}", trust_remote_code=True' in uploaded.text
    assert "Loading it from the Hub in a fresh process\n" in uploaded.text
    assert "It loads from the Hub and generates the same tokens" in uploaded.text
    repository = hub.repositories["user/internlm-tiny"]
    assert repository.private
    assert len(repository.commits) == 2  # the Hub's first, and ours
    sent = {path: hub.read("user/internlm-tiny", path) for path in repository.commits[commit].files}
    assert sent.keys() == {*SMALL_FILES, "model.safetensors", ".gitattributes"}
    assert sent.items() >= uploaded.files.items()
    sends = [path for method, path in uploaded.log if method == SENT[transfer][0] and SENT[transfer][1] in path]
    assert any(path.endswith("/4") for path in sends) if transfer == "lfs" else len(sends) == 1
    assert all(transfer == name or not hub.count(*SENT[name]) for name in SENT)


def test_users_load_it_by_name_and_it_generates(hub: Hub, uploaded: object, settings: dict[str, str]) -> None:
    """AutoModelForCausalLM and pipeline download the commit and generate."""
    command = [sys.executable, "-c", GENERATE, "user/internlm-tiny", head(hub, "user/internlm-tiny")]
    child = subprocess.run(command, env=settings, capture_output=True, text=True, encoding="utf-8")
    assert child.returncode == 0, child.stderr
    continued, reply = json.loads(child.stdout.splitlines()[-1])
    assert continued.startswith("<s>Coming to") and len(continued) > len("<s>Coming to")
    assert reply


def test_an_unchanged_second_upload_transfers_nothing(worker: Worker, quiet_hub: Hub, folder: Path) -> None:
    before = head(quiet_hub, "user/internlm-tiny")
    code, text = worker.run(*ASSEMBLE, "--local-dir", folder, "--repo-id", "internlm-tiny", *QUICK)
    assert code == 0, text
    assert f"0 files of 0.00B are new or changed, {len(SMALL_FILES) + 1} the same, 0 deleted, 1 kept." in text
    assert head(quiet_hub, "user/internlm-tiny") == before
    assert {method for method, _ in quiet_hub.log} == {"GET"}


def test_a_dry_run_shows_the_plan_and_writes_nothing(worker: Worker, quiet_hub: Hub, folder: Path) -> None:
    old = {"config.json": (folder / "config.json").read_bytes(), "README.md": b"old", "pytorch_model.bin": b"pickle"}
    old |= {
        "LICENSE": bytes((folder / "LICENSE").stat().st_size),
        "onnx/model.bin": b"mine",
    }  # its size only
    quiet_hub.add_repository("user/old", {**old, "tokenizer.json": b"{}", "notes/results.txt": b"mine"})
    argv = (*ASSEMBLE, "--local-dir", folder, "--repo-id", "user/old", "--no-verify-local", "--dry-run")
    code, text = worker.run(*argv)
    assert code == 0, text
    plan = {line.split()[3]: line.split()[:2] for line in text.splitlines() if len(line.split()) == 4}
    assert plan["config.json"][0] == "same"
    assert plan["README.md"][0] == plan["LICENSE"][0] == "changed"
    assert plan["model.safetensors"][0] == "new"
    assert plan["pytorch_model.bin"] == ["deleted", "-"]
    assert plan["tokenizer.json"][0] == "deleted"
    assert plan["notes/results.txt"][0] == plan["onnx/model.bin"][0] == "kept"
    assert plan["model.safetensors"][1] == digest(folder / "model.safetensors")
    assert {method for method, _ in quiet_hub.log} == {"GET"}


def test_another_tools_repository_is_overwritten_only_on_request(
    worker: Worker, quiet_hub: Hub, folder: Path, transfer: str
) -> None:
    """Pickles and other tokenizers are deleted, other files are kept, and the history keeps everything."""
    quiet_hub.add_repository(
        "user/mine", {"pytorch_model.bin": b"pickle", "modeling_old.py": b"", "photo.png": b"png"}
    )
    argv = (*ASSEMBLE, "--local-dir", folder, "--repo-id", "user/mine", *QUICK)
    before = head(quiet_hub, "user/mine")
    code, text = worker.run(*argv)
    assert code == errors.NameTaken.code
    assert "was not created by this tool. Choose another --repo-id, or overwrite its files with --yes." in text
    assert head(quiet_hub, "user/mine") == before
    code, text = worker.run(*argv, "--yes")
    assert code == 0, text
    repository = quiet_hub.repositories["user/mine"]
    files = repository.commits[head(quiet_hub, "user/mine")].files
    assert files.keys() == {*SMALL_FILES, "model.safetensors", ".gitattributes", "photo.png"}
    assert len(repository.commits) == 2
    assert quiet_hub.count(*SENT[transfer]) == 0  # the Hub has these objects already
    assert worker.run(*argv)[0] == 0  # and now the repository is this tool's


def test_uploads_to_a_branch_and_to_a_pull_request(worker: Worker, quiet_hub: Hub, folder: Path) -> None:
    """A new branch starts at main; a pull request leaves the branch unchanged and needs no --yes."""
    quiet_hub.add_repository("club/model", {"photo.png": b"png"})
    main = head(quiet_hub, "club/model")
    argv = (*ASSEMBLE, "--local-dir", folder, "--repo-id", "club/model", *QUICK)
    code, text = worker.run(*argv, "--create-pr")
    assert code == 0, text
    assert f'revision="{head(quiet_hub, "club/model", "refs/pr/1")}"' in text
    code, text = worker.run(*argv, "--revision", "v1", "--yes")
    assert code == 0, text
    assert f'revision="{head(quiet_hub, "club/model", "v1")}"' in text
    assert head(quiet_hub, "club/model") == main


def test_public_makes_the_repository_public(worker: Worker, quiet_hub: Hub, folder: Path) -> None:
    argv = (*ASSEMBLE, "--local-dir", folder, "--repo-id", "user/open", *QUICK, "--public")
    code, text = worker.run(*argv)
    assert code == 0, text
    assert not quiet_hub.repositories["user/open"].private
    code, text = worker.run(*argv[:-1])
    assert code == 0 and "Plan for user/open (public), revision main" in text


# Failures: one message, an exit code, nothing lost, and a rerun that succeeds


def move_target(hub: Hub, repo_id: str):
    """A fault: somebody else commits to the repository at this moment."""

    def act(request: object) -> None:
        repository = hub.repositories[repo_id]
        parent = repository.commits[repository.heads["main"]]
        repository.commit("main", "somebody else's", {**parent.files}, parent.oid)

    return act


FAILURES = {
    # name: (adds faults, arguments, token, the error, its message)
    "no token": (lambda hub: None, [], "", errors.NotLoggedIn, "You are not logged in: run `hf auth login`"),
    "wrong token": (lambda hub: None, [], "hf_wrong", errors.NotLoggedIn, "does not accept the token"),
    "read-only token": (lambda hub: None, [], "hf_reader", errors.Forbidden, "The token is read-only"),
    "token without permission": (
        lambda hub: hub.on("POST", "/repos/create", answer(403, "You don't have the rights")),
        [],
        TOKEN,
        errors.Forbidden,
        "The token lacks permission (You don't have the rights)",
    ),
    "unknown namespace": (
        lambda hub: None,
        ["--repo-id", "nobody/model"],
        TOKEN,
        errors.NotFound,
        "nobody/model does not exist, and this token can create repositories under user, club only.",
    ),
    "namespace deleted in the meantime": (
        lambda hub: hub.on("POST", "/repos/create", answer(404, "No such namespace")),
        [],
        TOKEN,
        errors.NotFound,
        "The Hub found nothing there (No such namespace)",
    ),
    "name taken": (
        lambda hub: hub.on("POST", "/repos/create", answer(409, "You already created this model repo")),
        [],
        TOKEN,
        errors.NameTaken,
        "exists already, and this token cannot read it",
    ),
    "a pull request to nothing": (
        lambda hub: None,
        ["--create-pr"],
        TOKEN,
        errors.NotFound,
        "user/failing does not exist, and this token can create repositories under user, club only.",
    ),
    "not a name": (
        lambda hub: None,
        ["--repo-id", "user/a--b"],
        TOKEN,
        errors.InputError,
        "--repo-id user/a--b: ",
    ),
    "server down at the start": (
        lambda hub: hub.on("GET", "/whoami", answer(503, "maintenance")),
        [],
        TOKEN,
        errors.ServerFailed,
        "The Hub answered 503 at /api/whoami-v2 (maintenance)",
    ),
    "no network at the start": (
        lambda hub: hub.on("GET", "/whoami", drop()),
        [],
        TOKEN,
        errors.NetworkLost,
        "The connection to the Hub was lost",
    ),
    "server down at the commit": (
        lambda hub: hub.on("POST", "/commit/", answer(500, "internal"), times=3),
        [],
        TOKEN,
        errors.ServerFailed,
        "/commit/main (internal): run the same command again later to resume.",
    ),
    "network down at the commit": (
        lambda hub: hub.on("POST", "/commit/", drop(after=1000), times=3),
        [],
        TOKEN,
        errors.NetworkLost,
        "finished files are not sent again",
    ),
    "card refused": (
        lambda hub: None,
        ["--card", "CARD"],
        TOKEN,
        errors.LocalCheckFailed,
        "README.md: its front matter, between two lines ---, must give at least a license.",
    ),
    "card refused by the Hub": (
        lambda hub: None,
        ["--card", "FLOW"],
        TOKEN,
        errors.LocalCheckFailed,
        "The Hub does not accept the card: ",
    ),
    "a token with curly quotes": (
        lambda hub: None,
        [],
        "\u201chf_wrong\u201d",
        errors.NotLoggedIn,
        "The token holds a character that no token has, such as a curly quote: copy it again.",
    ),
    "somebody is committing": (
        lambda hub: hub.on("POST", "/commit/", answer(409, "in progress")),
        [],
        TOKEN,
        errors.TargetMoved,
        "Somebody committed to the target in the meantime (in progress): run the same command again.",
    ),
    "target moved after the plan": (
        lambda hub: hub.on("POST", "/preupload/", move_target(hub, "user/failing")),
        [],
        TOKEN,
        errors.TargetMoved,
        "Somebody committed to user/failing (main) in the meantime: run the same command again.",
    ),
    "target moved at the commit": (
        lambda hub: hub.on("POST", "/commit/", move_target(hub, "user/failing")),
        [],
        TOKEN,
        errors.TargetMoved,
        "Somebody committed to the target in the meantime",
    ),
}

NOWHERE = "http://127.0.0.1:9"  # where nothing listens
STORAGE_FAILURES = {
    # how large files travel: {name: (request, fault, the error, its message)}
    "xet": {
        "no token, 401": ("GET", "/xet-write", answer(401), errors.NotLoggedIn, "does not accept the token"),
        "no token, 403": ("GET", "/xet-write", answer(403), errors.Forbidden, "The token lacks permission"),
        "no token, 404": ("GET", "/xet-write", answer(404), errors.NotFound, "The Hub found nothing there"),
        "no address": ("GET", "/xet-write", reply({}), errors.ServerFailed, "set HF_HUB_DISABLE_XET=1"),
        "unreachable": (
            "GET",
            "/xet-write",
            reply({}, {"X-Xet-Cas-Url": NOWHERE}),
            errors.NetworkLost,
            f"The Hub's storage at {NOWHERE} cannot be reached (ConnectError: ",
        ),
        "refused, 401": ("POST", "/v1/xorbs", answer(401), errors.ServerFailed, "storage answered 401"),
        "refused, 403": ("POST", "/v1/xorbs", answer(403), errors.ServerFailed, "storage answered 403"),
        "list refused": ("POST", "/v2/shards", answer(400), errors.ServerFailed, "storage answered 400"),
        "another answer": ("POST", "/v2/shards", reply({}), errors.ServerFailed, "The Hub's storage failed ("),
    },
    "lfs": {
        "refused, 403": ("PUT", "/lfs/", answer(403), errors.ServerFailed, "storage answered 403"),
        "refused, 409": ("PUT", "/lfs/", answer(409), errors.ServerFailed, "storage answered 409"),
        "refused, 412": ("PUT", "/lfs/", answer(412), errors.ServerFailed, "storage answered 412"),
        "lost by the storage": ("POST", "/verify$", answer(404), errors.ServerFailed, "storage answered 404"),
        "no links": ("POST", "objects/batch", reply({}), errors.ServerFailed, "The answer is not a Hub's"),
    },
}


@pytest.fixture
def fails_once(worker: Worker, quiet_hub: Hub, folder: Path, tmp_path: Path) -> Callable[..., None]:
    """Check that a command fails with one message and commits nothing, and succeeds once the cause is gone."""
    card, flow = tmp_path / "card.md", tmp_path / "flow.md"
    card.write_text("# No front matter\n")
    flow.write_text("---\n{license: mit}\n---\n")  # YAML that the tests' Hub refuses

    def check(error: type[errors.UploadError], message: str, more: tuple = (), token: str = TOKEN) -> None:
        quiet_hub.repositories.pop("user/failing", None)
        argv = [*ASSEMBLE, "--local-dir", folder, "--repo-id", "user/failing", *QUICK]
        cards = {"CARD": card, "FLOW": flow}
        code, text = worker.run(*argv, *(cards.get(word, word) for word in more), token=token)
        assert code == error.code, text
        assert message in text
        assert len([line for line in text.splitlines() if line.startswith("upload_to_hub.py: ")]) == 1
        assert "Traceback" not in text
        repository = quiet_hub.repositories.get("user/failing")
        assert repository is None or not any("upload_to_hub.py" in c.title for c in repository.commits.values())
        quiet_hub.faults.clear()
        own = more if "--weights" in more else ()  # what else was given is the cause
        code, text = worker.run(*argv, *own, "--yes")
        assert code == 0, text

    return check


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_has_one_message_and_a_rerun_succeeds(name: str, quiet_hub: Hub, fails_once: Callable) -> None:
    add_fault, more, token, error, message = FAILURES[name]
    add_fault(quiet_hub)
    fails_once(error, message, more, token)


@pytest.mark.parametrize("answer", [{}, [], b"<html>Log in</html>"], ids=["{}", "[]", "HTML"])
@pytest.mark.parametrize(
    "request_", ["GET /whoami", "GET /api/models/", "POST /repos/create", "POST /preupload/", "POST /commit/"]
)
def test_an_endpoint_that_is_no_hub_is_named_as_the_cause(
    request_: str, answer: object, quiet_hub: Hub, fails_once: Callable
) -> None:
    """HF_ENDPOINT names another server, or a proxy answers with its login page."""
    quiet_hub.on(*request_.split(), reply(answer), times=3)
    fails_once(errors.ServerFailed, "HF_ENDPOINT")


def test_a_failure_of_the_storage_has_one_message_and_a_rerun_succeeds(
    transfer: str, quiet_hub: Hub, tmp_path: Path, fails_once: Callable, subtests: pytest.Subtests
) -> None:
    """Of the storage, its links and its tokens: what to do differs from the same status of the Hub itself."""
    weights = tmp_path / "weights"
    shutil.copytree(TINY, weights)
    tensors = load_file(weights / "model.safetensors")
    for name, (method, path, fault, error, message) in STORAGE_FAILURES[transfer].items():
        with subtests.test(name):
            tensors["model.norm.weight"] = torch.rand(len(tensors["model.norm.weight"]))  # not sent before
            (weights / "model.safetensors").unlink()
            save_file(tensors, weights / "model.safetensors")
            quiet_hub.on(method, path, fault, times=100)
            fails_once(error, message, ("--weights", weights, "--local-dir", tmp_path / "out"))


def test_an_error_during_the_check_of_a_commit(worker: Worker, quiet_hub: Hub, folder: Path) -> None:
    """One that passes is not noticed; after a longer one a rerun checks the commit, which is complete."""
    argv = (*ASSEMBLE, "--local-dir", folder, "--repo-id", "user/checked", "--no-verify-local")
    quiet_hub.on("GET", "/resolve/.*/config.json", answer(500), times=2)
    code, text = worker.run(*argv)
    assert code == 0, text
    quiet_hub.on("GET", "/resolve/.*/config.json", answer(500, "internal"), times=100)
    code, text = worker.run(*argv)
    assert code == errors.NetworkLost.code
    assert "user/checked is on the Hub, but could not be checked. The Hub answered 500 at /user/checked/" in text
    assert text.endswith("(internal): run the same command again later to resume.\n")


@pytest.mark.parametrize("fault", [drop(after=1000), lose_answer, answer(502, "bad gateway")])
def test_a_commit_whose_answer_is_lost_is_not_repeated(fault, worker: Worker, quiet_hub: Hub, folder: Path) -> None:
    """The client does not retry a commit; this tool does, after checking whether it arrived."""
    quiet_hub.repositories.pop("user/lost", None)
    quiet_hub.on("POST", "/commit/", fault)
    code, text = worker.run(*ASSEMBLE, "--local-dir", folder, "--repo-id", "user/lost", *QUICK)
    assert code == 0, text
    assert f'revision="{head(quiet_hub, "user/lost")}"' in text
    assert len(quiet_hub.repositories["user/lost"].commits) == 2
    assert quiet_hub.count("POST", "/commit/") == (1 if fault is lose_answer else 2)


def test_files_that_differ_after_the_commit_are_found(worker: Worker, quiet_hub: Hub, folder: Path) -> None:
    def tamper(request: object) -> None:
        repository = quiet_hub.repositories["user/tampered"]
        files = repository.commits[repository.heads["main"]].files
        files.pop("LICENSE")
        files["pytorch_model.bin"] = files["README.md"]

    quiet_hub.add_repository("user/tampered", {"pytorch_model.bin": b"pickle"})
    quiet_hub.on("GET", "/tree/", lambda request: None, times=2)  # the two fetches before the commit
    quiet_hub.on("GET", "/tree/", tamper)
    code, text = worker.run(*ASSEMBLE, "--local-dir", folder, "--repo-id", "user/tampered", *QUICK, "--yes")
    assert code == errors.RemoteCheckFailed.code
    assert "is not what was sent (LICENSE, pytorch_model.bin): run the same command again." in text


def test_a_commit_of_somebody_else_is_noticed(worker: Worker, quiet_hub: Hub, folder: Path) -> None:
    """Where there is nothing to send; and where the answer to our commit, which did not arrive, is lost."""
    quiet_hub.repositories.pop("user/two", None)
    argv = (*ASSEMBLE, "--local-dir", folder, "--repo-id", "user/two", *QUICK)

    def move_and_drop(request: object) -> None:
        move_target(quiet_hub, "user/two")(request)
        raise Dropped

    quiet_hub.on("POST", "/commit/", move_and_drop)
    code, text = worker.run(*argv)
    assert code == errors.TargetMoved.code
    assert "Somebody committed to user/two (main) in the meantime: run the same command again." in text
    assert worker.run(*argv, "--yes")[0] == 0
    quiet_hub.on("GET", "/revision/main", lambda request: None, times=2)  # of the two fetches for the plan
    quiet_hub.on("GET", "/revision/main", move_target(quiet_hub, "user/two"))
    code, text = worker.run(*argv)
    assert code == errors.TargetMoved.code, text


def test_a_pull_request_whose_answer_is_lost_is_not_repeated(worker: Worker, quiet_hub: Hub, folder: Path) -> None:
    """A second one would be worse than none."""
    quiet_hub.add_repository("user/asked")
    quiet_hub.on("POST", "/commit/", lose_answer)
    argv = (*ASSEMBLE, "--local-dir", folder, "--repo-id", "user/asked", *QUICK, "--create-pr")
    code, text = worker.run(*argv)
    assert code == errors.NetworkLost.code, text
    assert quiet_hub.repositories["user/asked"].heads.keys() == {"main", "refs/pr/1"}


def sharded(folder: Path) -> Path:
    """checkpoints/tiny in several shards."""
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(TINY / "model.safetensors")
    listed = [Tensor(name, tuple(t.shape), t.dtype, lambda t=t: t) for name, t in sorted(tensors.items())]
    size = sum(tensor.nbytes for tensor in listed)
    assert len(write_shards(listed, folder, size // 3, progress=False)) > 2
    return folder


def test_a_killed_upload_resumes_without_sending_finished_files_again(
    worker: Worker, quiet_hub: Hub, settings: dict[str, str], transfer: str, tmp_path: Path
) -> None:
    """SIGKILL while the last shard is being sent; by LFS, the connection broke once before in another shard.

    By Xet small files travel together: what is sent is finished once the storage has their list.
    """
    weights, local = sharded(tmp_path / "sharded"), tmp_path / "out"
    argv = ["--weights", weights, *ASSEMBLE[2:], "--local-dir", local, "--repo-id", "user/killed", *QUICK]
    objects = {name: digest(weights / name) for name in sorted(os.listdir(weights)) if name.endswith(".safetensors")}
    last = objects.popitem()[1]
    hold = Hold()
    quiet_hub.on("PUT", f"/lfs/{last}", hold)
    quiet_hub.on("POST", "/v2/shards", hold)
    quiet_hub.on("PUT", f"/lfs/{next(iter(objects.values()))}", drop(after=5000))
    process = start(settings, *argv)
    assert hold.reached.wait(90)
    while transfer == "lfs" and not quiet_hub.objects.keys() >= set(objects.values()):
        assert process.poll() is None
        threading.Event().wait(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    hold.release.set()
    assert "user/killed" in quiet_hub.repositories
    assert len(quiet_hub.repositories["user/killed"].commits) == 1

    quiet_hub.log.clear()
    code, text = worker.run(*argv)
    assert code == 0, text
    if transfer == "lfs":
        assert quiet_hub.count("PUT", f"/lfs/{last}") > 0
        assert quiet_hub.count("PUT", "/lfs/") == quiet_hub.count("PUT", f"/lfs/{last}")
    assert len(quiet_hub.repositories["user/killed"].commits) == 2


def digest(path: Path) -> str:
    return subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]


def test_ctrl_c_in_the_middle_of_a_file_exits_at_once(
    quiet_hub: Hub, settings: dict[str, str], folder: Path, transfer: str, uploaded: object, tmp_path: Path
) -> None:
    """The client alone would first finish the files that it has started."""
    weights = folder / "model.safetensors"
    kept = quiet_hub.objects.pop(digest(weights))
    hold = Hold()
    quiet_hub.on(*SENT[transfer], hold, times=100)
    own = {**settings, "HF_HOME": str(tmp_path)}  # where hf_xet does not know that it has sent these before
    process = start(own, *ASSEMBLE, "--local-dir", folder, "--repo-id", "user/interrupted", *QUICK)
    assert hold.reached.wait(90)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=5)
    hold.release.set()
    quiet_hub.objects[digest(weights)] = kept
    assert process.returncode == errors.INTERRUPTED
    assert text.endswith("Interrupted: run the same command again to resume.\n")
    assert "Traceback" not in text
    assert len(quiet_hub.repositories["user/interrupted"].commits) == 1


def test_a_lost_connection_is_reported_after_the_retries(unreachable: tuple[Hub, Worker], transfer: str) -> None:
    """Last, because the client retries for up to a minute; it sends the dropped file five or six times."""
    hub, worker = unreachable
    code, text = worker.receive()
    assert code == errors.NetworkLost.code
    assert "run the same command again; finished files are not sent again." in text
    assert "Traceback" not in text
    assert hub.count(*SENT[transfer]) >= 5
    assert len(hub.repositories["user/dropped"].commits) == 1
