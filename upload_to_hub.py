"""From old InternLM v1 weights to a verified Hub repository in one command.

    python upload_to_hub.py --weights OLD_FOLDER --repo-id me/internlm-20b

1. assemble: today's code, small files and a model card beside the weights, which become safetensors (a folder of hard
   links where possible);
2. verify the folder: the files, then loading it in a fresh process;
3. plan: what would change on the Hub (--dry-run stops here);
4. upload: large files first, then one commit that switches the repository over;
5. verify the commit: its hashes, then loading it from the Hub in a fresh process.

An interrupted run loses nothing: the same command continues it.
"""

import argparse
import errno
import importlib.util
import io
import json
import math
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.hub import errors


# Before the imports that need them; httpx2 is what tells a huggingface_hub that is recent enough.
NEEDED = ("torch", "transformers", "accelerate", "sentencepiece", "huggingface_hub", "httpx2", "safetensors", "tqdm")
if __name__ == "__main__" and (missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]):
    print(f"upload_to_hub.py: {', '.join(missing)} missing: pip install -r requirements.txt", file=sys.stderr)
    sys.exit(errors.InputError.code)

from tools.convert.files import ConversionError  # noqa: E402
from tools.hub.assemble import Assembly, assemble  # noqa: E402
from tools.hub.check import check_files, check_loading  # noqa: E402
from tools.hub.variant import variants  # noqa: E402


if TYPE_CHECKING:
    from huggingface_hub import HfApi


def _parser() -> argparse.ArgumentParser:
    classes = errors.UploadError.__subclasses__()
    codes = [(0, "done"), (2, "the command line is wrong"), *((c.code, c.meaning) for c in classes)]
    codes += [(errors.INTERRUPTED, "interrupted with Ctrl-C; rerun, it continues"), (1, "a mistake in this tool")]
    parser = argparse.ArgumentParser(
        prog="upload_to_hub.py",
        description=__doc__,
        epilog="exit codes:\n" + "\n".join(f"  {code:3}  {meaning}" for code, meaning in codes),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    group = parser.add_argument_group("what to assemble")
    group.add_argument(
        "--weights",
        type=Path,
        metavar="FOLDER",
        help="the checkpoint: config.json, tokenizer.model and *.safetensors or pytorch_model*.bin; only read",
    )
    group.add_argument("--variant", help=f"which InternLM it is, if that is not clear: {', '.join(variants())}")
    group.add_argument("--tokenizer", type=Path, metavar="FILE", help="tokenizer.model, if it lies elsewhere")
    group.add_argument(
        "--card", type=Path, metavar="FILE", help="a README.md of your own instead of the filled-in one"
    )
    group.add_argument(
        "--local-dir",
        type=Path,
        metavar="FOLDER",
        help="where to assemble; without --repo-id nothing is uploaded (default: beside the weights, WEIGHTS-hub)",
    )
    group.add_argument("--no-verify-local", action="store_true", help="check the files only, do not load the model")
    group = parser.add_argument_group("what to upload to")
    group.add_argument("--repo-id", metavar="NAMESPACE/NAME", help="the repository; made if it does not exist")
    group.add_argument("--revision", default="main", help="branch, made if it does not exist (default: %(default)s)")
    group.add_argument("--create-pr", action="store_true", help="open a pull request instead of writing to the branch")
    group.add_argument("--public", action="store_true", help="make a new repository public (default: private)")
    group.add_argument("--dry-run", action="store_true", help="show the plan, and write nothing to the Hub")
    group.add_argument("--yes", action="store_true", help="overwrite a repository that this tool did not make")
    group.add_argument(
        "--no-verify-remote", action="store_true", help="compare hashes only, do not download and load the commit"
    )
    return parser


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.weights is None or not (arguments.repo_id or arguments.local_dir):
        parser.error(
            "give --weights FOLDER (the old checkpoint), and --repo-id NAMESPACE/NAME to upload to or --local-dir "
            "FOLDER to assemble only. For example:\n"
            "  python upload_to_hub.py --weights internlm-20b --local-dir out\n"
            "  python upload_to_hub.py --weights internlm-20b --repo-id me/internlm-20b --dry-run\n"
            "Log in first: hf auth login, or set HF_TOKEN. All options: --help"
        )
    if arguments.local_dir is None:
        weights = arguments.weights.resolve()
        arguments.local_dir = weights.with_name(weights.name + "-hub")
    return arguments


def _log_in(arguments: argparse.Namespace) -> tuple["HfApi", str]:
    """The client and the full name of the repository; what is wrong with either is said before the long work."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    from tools.hub.push import look

    api = HfApi()
    user = api.whoami()
    role = ((user.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise errors.Forbidden("The token may only read: make one that may write on the Hub's page of access tokens.")
    repo_id = arguments.repo_id if "/" in arguments.repo_id else f"{user['name']}/{arguments.repo_id}"
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise errors.InputError(f"--repo-id {repo_id}: {error}") from error
    namespaces = [user["name"], *(organisation["name"] for organisation in user.get("orgs", []))]
    exists = look(api, repo_id, arguments.revision).exists
    if not exists and (arguments.create_pr or repo_id.split("/")[0] not in namespaces):
        raise errors.NotFound(
            f"{repo_id} does not exist, and this token can make repositories under {', '.join(namespaces)} only."
        )
    return api, repo_id


def _assemble(arguments: argparse.Namespace, repo_id: str | None) -> tuple[Assembly, dict[str, Any] | None]:
    """Steps 1 and 2."""
    print(f"Assembling {arguments.local_dir}")
    made = assemble(
        arguments.weights, arguments.local_dir, arguments.variant, arguments.tokenizer, arguments.card, repo_id
    )
    for note in made.notes:
        print(f"  - {note}")
    check_files(made.out)
    if arguments.no_verify_local:
        print("The files are sound; the model was not loaded.")
        return made, None
    print("Loading it in a fresh process")
    heard = check_loading(str(made.out))
    print(f"It loads and speaks: tokens {heard['tokens']}, sum of |logits| {heard['logits']:.6g}")
    return made, heard


def _confirm(target: Any, arguments: argparse.Namespace) -> None:
    """Ask before the files of a repository that this tool did not make are overwritten."""
    if not target.foreign or arguments.yes or arguments.create_pr:
        return
    question = f"{target.repo_id} ({target.revision}) holds files, and was not made by this tool."
    if not sys.stdin.isatty() or input(f"{question} Overwrite? [y/N] ").strip().lower() not in ("y", "yes"):
        raise errors.NameTaken(f"{question} Choose another --repo-id, or overwrite its files with --yes.")


def _upload(arguments: argparse.Namespace) -> None:
    """All five steps."""
    from tools.hub import push as hub_push

    api, repo_id = _log_in(arguments)
    made, heard = _assemble(arguments, repo_id)
    target = hub_push.look(api, repo_id, arguments.revision)
    plan = hub_push.make_plan(made.out, made.files, target)
    kind = "private" if (target.private if target.exists else not arguments.public) else "public"
    print(f"Plan for {repo_id} ({kind}{'' if target.exists else ', new'}), revision {arguments.revision}:\n{plan}")
    if arguments.dry_run:
        return print("Nothing was written: this was a dry run.")
    _confirm(target, arguments)
    before = signal.signal(signal.SIGINT, _leave_at_once)
    try:
        title = f"Upload {made.variant} with {hub_push.TOOL}"
        commit = hub_push.push(api, plan, title, not arguments.public, arguments.create_pr)
    finally:
        signal.signal(signal.SIGINT, before)
    hub_push.check_hashes(api, plan, commit)
    print(f"Uploaded: commit {commit}, its hashes are those of the plan")
    if not arguments.no_verify_remote:
        _verify_remote(made, heard, repo_id, commit)
    print(
        f'AutoModelForCausalLM.from_pretrained("{repo_id}", revision="{commit}", trust_remote_code=True, '
        'dtype="auto", device_map="auto")'
    )


def _verify_remote(made: Assembly, heard: dict[str, Any] | None, repo_id: str, commit: str) -> None:
    """Load the commit from the Hub in a fresh process with an empty cache, and compare what it says."""
    needed = sum((made.out / name).stat().st_size for name in made.files)
    if shutil.disk_usage(made.out.parent).free < needed:
        raise errors.DiskFull(
            f"{repo_id} is uploaded, but to download and load it {needed / 1e9:.1f} GB are needed in "
            f"{made.out.parent}: make room and run this again, or add --no-verify-remote."
        )
    print("Loading it from the Hub in a fresh process")
    try:
        there = check_loading(repo_id, commit, scratch=made.out.parent)
    except errors.LocalCheckFailed as error:
        raise errors.RemoteCheckFailed(str(error)) from error
    if heard and (
        there["tokens"] != heard["tokens"] or not math.isclose(there["logits"], heard["logits"], rel_tol=1e-4)
    ):
        raise errors.RemoteCheckFailed(f"{repo_id} at {commit} speaks differently from the folder: {there}, {heard}.")
    print("It loads from there and says the same")


def _leave_at_once(*_: Any) -> None:
    # The client's threads would finish their files first, gigabytes later; whole files stay on the Hub.
    os.write(2, b"\nInterrupted: run the same command again, it continues.\n")
    os._exit(errors.INTERRUPTED)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _explain(error: Exception) -> errors.UploadError | None:
    """The user's view of whatever went wrong, None for a mistake in this tool."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    for cause in _chain(error):
        if isinstance(cause, errors.UploadError):
            return cause
        if isinstance(cause, ConversionError):
            return errors.InputError(str(cause))
        if isinstance(cause, LocalTokenNotFoundError):
            return errors.NotLoggedIn("You are not logged in: run `hf auth login`, or set HF_TOKEN.")
        if isinstance(cause, OfflineModeIsEnabled):
            return errors.NetworkLost("HF_HUB_OFFLINE is set: unset it to upload.")
        if isinstance(cause, HfHubHTTPError):
            return _explain_status(cause)
        if isinstance(cause, httpx2.TransportError):
            return errors.NetworkLost(
                f"The connection to the Hub was lost ({type(cause).__name__}: {cause}): run the same command again, "
                "files that arrived are not sent again."
            )
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return errors.DiskFull("The disk is full: make room and run the same command again, it continues.")
        if isinstance(cause, json.JSONDecodeError):
            return errors.ServerFailed("The Hub's answer is not JSON: run this again later, it continues.")
        if isinstance(cause, ValueError) and "README.md" in str(cause):
            return errors.LocalCheckFailed(f"The Hub does not accept the card: {cause}")
    return None


def _explain_status(error: Any) -> errors.UploadError:
    status, path = error.response.status_code, error.response.request.url.path
    said = " ".join((error.server_message or "").split()) or error.response.reason_phrase
    if status == 401:
        return errors.NotLoggedIn(
            f"The Hub does not accept the token ({said}): run `hf auth login --force`, or set HF_TOKEN to a valid one."
        )
    if status == 403:
        return errors.Forbidden(f"The token may not do this ({said}): use one that may write to this namespace.")
    if status == 404:
        return errors.NotFound(f"The Hub knows no such place ({said}): check --repo-id and --revision.")
    if status == 409:
        return errors.NameTaken(f"The name is taken ({said}): choose another --repo-id.")
    if status == 412:
        return errors.TargetMoved(f"Somebody committed to the target meanwhile ({said}): run this again.")
    return errors.ServerFailed(f"The Hub answered {status} at {path} ({said}): run this again later, it continues.")


def _without_token(text: str) -> str:
    """The text with the user's token blotted out, should it ever get there."""
    from huggingface_hub import get_token

    try:
        token = get_token()
    except Exception:  # no token can be found out
        return text
    return text.replace(token, "hf_***") if token else text


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = _arguments(argv)
    try:
        if arguments.repo_id:
            _upload(arguments)
        else:
            made, _ = _assemble(arguments, None)
            print(f"{made.out} is a complete repository of {made.variant}.")
        return 0
    except KeyboardInterrupt:
        print("\nInterrupted: run the same command again, it continues.", file=sys.stderr)
        return errors.INTERRUPTED
    except Exception as error:
        known = _explain(error)
        if known is None:
            print(_without_token(traceback.format_exc()), file=sys.stderr)
            print("This is a mistake in the tool; please report the lines above.", file=sys.stderr)
            return 1
        print(f"upload_to_hub.py: {_without_token(str(known))}", file=sys.stderr)
        return known.code


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # in order with the progress bars, in a log file too
    sys.exit(main())


__all__ = ["Assembly", "assemble", "main"]
