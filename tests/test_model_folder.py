"""What MODEL may be (tools/model_folder.py): a model that loads, or one line that says what to do."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tools import model_folder
from tools.model_folder import ADAPTER, OURS, TINY_OUT, base_model, complete_model
from tools.package import MODULES

from support.hub_server import TOKEN, Hub, User, answer, drop, environment
from support.paths import ROOT, TINY


def configured(folder: Path, **fields: object) -> Path:
    """A folder with a config.json."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize("name", [None, "checkpoints/tiny", str(TINY), str(TINY_OUT)])
def test_the_tiny_checkpoint_is_completed(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    folder = Path(complete_model(name))
    assert folder == ROOT / "build" / "internlm-tiny"
    assert all((folder / file).is_file() for file in (*MODULES, "model.safetensors"))


def test_a_complete_folder_is_taken_as_it_is(tiny_dir: Path) -> None:
    assert complete_model(str(tiny_dir)) == str(tiny_dir)


def test_the_real_model_is_made_by_a_command_and_gets_the_code_of_this_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "smollm2"
    monkeypatch.setattr(model_folder, "REAL", folder)
    with pytest.raises(SystemExit, match="smollm2' is not there yet: `make real` makes it"):
        complete_model(str(folder))
    configured(folder, model_type="internlm")
    (folder / OURS).write_text("an older version")
    assert complete_model(str(folder)) == str(folder)
    assert (folder / OURS).read_bytes() == (ROOT / OURS).read_bytes()
    assert "AutoModelForCausalLM" in (folder / "config.json").read_text()


FOLDERS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "empty": (lambda path: shutil.copytree(ROOT / "docs", path), "has no config.json: give a model's folder"),
    "damaged": (configured, "config.json is damaged"),
    "another model": (lambda path: configured(path, model_type="llama"), "of type 'llama', not 'internlm'.* Llama's"),
    "without code": (lambda path: shutil.copytree(TINY, path), "upload_to_hub.py --weights {} --local-dir x-new`"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_other_folders_are_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    make, message = FOLDERS[kind]
    folder = make(tmp_path / "x")
    with pytest.raises(SystemExit, match=message.format(folder)) as stopped:
        complete_model(str(folder))
    assert "\n" not in str(stopped.value)


def adapter(folder: Path, **fields: object) -> str:
    """A folder with an adapter_config.json."""
    folder.mkdir()
    (folder / ADAPTER).write_text(json.dumps(fields))
    return str(folder)


@pytest.fixture
def peft_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as tools/model_folder.py looks."""
    monkeypatch.setattr(model_folder, "find_spec", lambda name: name == "peft")


@pytest.mark.usefixtures("peft_is_installed")
def test_an_adapter_names_its_model(tmp_path: Path, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no adapter has no base model. The tiny model is made again if it is gone."""
    monkeypatch.setattr(model_folder, "TINY_OUT", tmp_path / "internlm-tiny")
    for number, base in enumerate((str(tiny_dir), str(tmp_path / "internlm-tiny"))):
        assert base_model(adapter(tmp_path / str(number), base_model_name_or_path=base)) == base
    assert (tmp_path / "internlm-tiny" / "model.safetensors").is_file()
    assert base_model(None) is None and base_model(str(tiny_dir)) is None


@pytest.mark.usefixtures("peft_is_installed")
def test_adapters_without_their_model_are_refused_in_one_line(tmp_path: Path) -> None:
    gone = str(tmp_path / "gone")
    for number, (fields, message) in enumerate(
        (
            (
                {"base_model_name_or_path": str(ROOT / "docs")},
                f"names its model: {str(ROOT / 'docs')!r} has no config",
            ),
            ({"base_model_name_or_path": gone}, f"names its model: {gone!r} is neither a folder here nor"),
            ({"base_model_name_or_path": None}, f"{ADAPTER} is damaged"),
            ({}, f"{ADAPTER} is damaged"),
        )
    ):
        folder = adapter(tmp_path / str(number), **fields)
        with pytest.raises(SystemExit) as stopped:
            base_model(folder)
        assert str(stopped.value).startswith(repr(folder)) and message in str(stopped.value)
        assert "\n" not in str(stopped.value)


def test_an_adapter_needs_peft(tmp_path: Path, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line names the Python that lacks it: `make` has an environment of its own."""
    monkeypatch.setattr(model_folder, "find_spec", lambda name: None)
    folder = adapter(tmp_path / "a", base_model_name_or_path=str(tiny_dir))
    with pytest.raises(SystemExit, match="-m pip install -r requirements-finetune.txt$") as stopped:
        base_model(folder)
    assert sys.executable in str(stopped.value)


def test_an_adapter_is_no_whole_model(tmp_path: Path) -> None:
    """Where a whole model is needed, the line says how to make one."""
    folder = adapter(tmp_path / "a", base_model_name_or_path="internlm/internlm-chat-20b")
    with pytest.raises(SystemExit, match=r"is an adapter, and .* with --merge, and give .*merged\.$"):
        complete_model(folder)


def test_code_of_2023_is_not_this_projects() -> None:
    assert OURS in MODULES


# huggingface_hub reads HF_ENDPOINT when it is imported.
COMPLETE = """
import json, sys
from tools.model_folder import complete_model
for name in sys.argv[1:]:
    try:
        print(json.dumps([True, complete_model(name)]))
    except SystemExit as error:
        print(json.dumps([False, error.code]))
"""


def complete(hub: Hub, home: Path, *names: str, **settings: str) -> list[tuple[bool, str]]:
    """For each name, whether it is a model, and what complete_model says."""
    env = environment(hub, home, "lfs") | settings
    command = [sys.executable, "-c", COMPLETE, *names]
    process = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert process.returncode == 0 and not process.stderr, process.stderr
    return [tuple(json.loads(line)) for line in process.stdout.splitlines()]


def test_repositories(tmp_path: Path, tiny_dir: Path) -> None:
    """Ours is taken, also offline when it is in the cache; of others, one line says what is the matter."""
    ours = {file: (tiny_dir / file).read_bytes() for file in ("config.json", *MODULES)}
    of_2023 = {file: ours[file] for file in ("config.json", "modeling_internlm.py")}
    with Hub() as hub:
        hub.users[TOKEN] = User("user")
        for name, files in {"ours": ours, "old": of_2023, "empty": {}, "broken": ours}.items():
            hub.add_repository(f"user/{name}", files)
        hub.on("HEAD", "/user/broken/", answer(500))
        names = ("ours", "old", "empty", "absent", "broken")
        found = dict(zip(names, complete(hub, tmp_path, *(f"user/{name}" for name in names), "a/b/c"), strict=False))
        assert found["ours"] == (True, "user/ours")
        for name, message in {
            "old": "`hf download user/old --local-dir old && python upload_to_hub.py --weights old --local-dir old-",
            "empty": "has no config.json",
            "absent": "is neither a folder here nor a repository that the Hub shows you",
            "broken": "cannot be read: ",
        }.items():
            assert not found[name][0] and message in found[name][1] and "\n" not in found[name][1], found[name]
        assert complete(hub, tmp_path, "user/ours", HF_HUB_OFFLINE="1") == [(True, "user/ours")]
        (offline,) = complete(hub, tmp_path, "user/absent", HF_HUB_OFFLINE="1")
        hub.on("HEAD", "/user/new/", drop())
        (dropped,) = complete(hub, tmp_path, "user/new")
    for refused, message in (offline, dropped):
        assert not refused and "the Hub cannot be reached" in message, message


@pytest.mark.parametrize("example", ["demo", "chat", "pipeline"])
def test_commands_print_that_line_and_nothing_else(example: str, tmp_path: Path) -> None:
    command = [sys.executable, f"examples/{example}.py", "--model", str(tmp_path)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert process.returncode == 1 and process.stdout == ""
    assert process.stderr.startswith(f"{str(tmp_path)!r} has no config.json") and process.stderr.count("\n") == 1
