"""What a user may name as a model: a folder, a repository on the Hub, or nothing for this project's tiny model."""

import json
import shlex
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import httpx2
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from tools.hub.assemble import assemble
from tools.package import REAL, ROOT, add_modules


TINY = ROOT / "checkpoints" / "tiny"
TINY_OUT = ROOT / "build" / "internlm-tiny"
EXAMPLE = "internlm/internlm-chat-20b"
OURS = "rotary_internlm.py"  # a module that the code of 2023 lacks
ADAPTER = "adapter_config.json"


def complete_model(name: str | None = None) -> str:
    """A folder or repository that the Auto classes load with this code: `name` itself, or a folder made of it.

    Args:
        name: A folder or a repository id. checkpoints/tiny, which is None, too, is completed in build/internlm-tiny,
            and build/smollm2 gets the code of this checkout. An adapter is refused: base_model gives its model.

    Raises:
        SystemExit: It is not there, or not InternLM with this code. The message, one line, says what to do.
    """
    if name is None or Path(name).resolve() in (TINY, TINY_OUT):
        return str(assemble(weights=TINY, out=TINY_OUT, progress=False).out)
    if Path(name).resolve() == REAL:
        if not REAL.exists():
            raise SystemExit(f"{name!r} is not there yet: `make real` makes it.")
        add_modules(REAL)
    config = _file(name, "config.json")
    if config is None and _file(name, ADAPTER) is not None:
        raise SystemExit(
            f"{name!r} is an adapter, and this needs a whole model: repeat the command that trained it with --merge, "
            f"and give {Path(name) / 'merged'}."
        )
    if config is None:
        raise SystemExit(f"{name!r} has no config.json: give a model's folder, or a repository such as {EXAMPLE}.")
    try:
        model_type = json.loads(config.read_text(encoding="utf-8"))["model_type"]
    except (ValueError, LookupError, TypeError) as error:
        raise SystemExit(f"{name!r}: config.json is damaged ({error!r}); fetch it again.") from error
    if model_type != "internlm":
        raise SystemExit(
            f"{name!r} is a model of type {model_type!r}, not 'internlm': transformers runs it without this project "
            "(`transformers serve`, pipeline). If it is a copy in Llama's layout, give the folder that it was made of."
        )
    if _file(name, OURS) is None:
        short, local = Path(name).name, Path(name).is_dir()
        weights, new = shlex.quote(name if local else short), shlex.quote(f"{short}-new")
        raise SystemExit(
            f"{name!r} lacks this project's code: complete it with `"
            + ("" if local else f"hf download {name} --local-dir {weights} && ")
            + f"python upload_to_hub.py --weights {weights} --local-dir {new}`, and give {new}."
        )
    return name


def base_model(name: str | None) -> str | None:
    """The complete model that an adapter was trained on; None if `name` is no adapter.

    Raises:
        SystemExit: The model is not there, or peft is not installed. The message, one line, says what to do.
    """
    # A repository with a config.json is not looked at further, so that it needs no network if it is in the cache.
    if name is None or (not Path(name).is_dir() and _file(name, "config.json") is not None):
        return None
    file = _file(name, ADAPTER)
    if file is None:
        return None
    try:
        base = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
        if not isinstance(base, str):
            raise TypeError(base)
    except (ValueError, LookupError, TypeError) as error:
        raise SystemExit(f"{name!r}: {ADAPTER} is damaged ({error!r}); fetch it again.") from error
    if find_spec("peft") is None:
        install = f"{shlex.quote(sys.executable)} -m pip install -r requirements-finetune.txt"
        raise SystemExit(f"{name!r} is an adapter, for which peft is missing: {install}")
    try:
        return complete_model(base)
    except SystemExit as error:
        raise SystemExit(f"{name!r} is an adapter, and {ADAPTER} names its model: {error}") from error


def _file(name: str, file: str) -> Path | None:
    """The path of a file of the folder or repository, None if it has no such file; SystemExit if it cannot be read."""
    folder = Path(name)
    if folder.is_dir():
        return folder / file if (folder / file).is_file() else None
    try:
        with suppress(LocalEntryNotFoundError):
            return Path(hf_hub_download(name, file, local_files_only=True))
        get_hf_file_metadata(hf_hub_url(name, file))  # without hf_hub_download's retries of 23 s
        return Path(hf_hub_download(name, file))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, httpx2.TransportError) as error:
        raise SystemExit(
            f"{name!r} is not a folder here, and the Hub cannot be reached to look for a repository of this name: "
            "check the spelling, or the network and HF_ENDPOINT."
        ) from error
    except EntryNotFoundError:
        return None
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise SystemExit(
            f"{name!r} is neither a folder here nor a repository that the Hub shows you: check the spelling, or log "
            "in with `hf auth login` if it is private."
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise SystemExit(f"{name!r} cannot be read: {str(error).splitlines()[0]}") from error
