"""What a user may name as a model: a folder, a repository on the Hub, or nothing for this project's tiny model."""

import json
import shlex
from contextlib import suppress
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
from tools.package import ROOT


TINY = ROOT / "checkpoints" / "tiny"
EXAMPLE = "internlm/internlm-chat-20b"
OURS = "rotary_internlm.py"  # a module that the code of 2023 lacks


def complete_model(name: str | None = None) -> str:
    """A folder or repository that the Auto classes load with this code: `name` itself, or a folder made of it.

    Args:
        name: A folder or a repository id. checkpoints/tiny, which is None, too, is completed in build/internlm-tiny.

    Raises:
        SystemExit: It is not there, or not InternLM with this code. The message, one line, says what to do.
    """
    if name is None or Path(name).resolve() == TINY:
        return str(assemble(weights=TINY, out=ROOT / "build" / "internlm-tiny", progress=False).out)
    config = _file(name, "config.json")
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
