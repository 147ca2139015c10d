"""From old InternLM v1 weights to a verified Hub repository in one command.

    python upload_to_hub.py --weights OLD_FOLDER --repo-id me/internlm-20b

1. assemble: today's code, small files and a model card beside the weights, which become safetensors (a folder of hard
   links where possible);
2. verify the folder: the files, then loading it in a fresh process;
3. plan: what would change on the Hub (--dry-run stops here);
4. upload: large files first, then one commit that changes everything at once;
5. verify the commit: its hashes, then loading it from the Hub in a fresh process.

An interrupted run loses nothing: the same command resumes it.
"""

import argparse
import importlib.util
import io
import math
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.hub import errors


# Before the imports that need them; httpx2 is what tells a huggingface_hub that is recent enough.
NEEDED = ("torch", "transformers", "accelerate", "sentencepiece", "huggingface_hub", "httpx2", "safetensors", "tqdm")
if __name__ == "__main__" and (missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]):
    print(f"upload_to_hub.py: {', '.join(missing)} missing: pip install -r requirements.txt", file=sys.stderr)
    sys.exit(errors.InputError.code)

from tools.hub.assemble import Assembly, assemble, check_out  # noqa: E402
from tools.hub.check import check_files, check_loading  # noqa: E402
from tools.hub.variant import CUSTOM, PROMPT_FORMATS, variants  # noqa: E402


if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from tools.hub.push import Plan, Target

Sample = dict[str, Any]  # tokens and logits, from check_loading


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="upload_to_hub.py",
        description=__doc__,
        epilog="exit codes:\n" + "\n".join(f"  {code:3}  {meaning}" for code, meaning in errors.exit_codes()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument_group("what to assemble").add_argument
    add(
        "--weights",
        type=Path,
        metavar="FOLDER",
        help="the checkpoint: config.json, tokenizer.model and *.safetensors or pytorch_model*.bin; only read",
    )
    add("--variant", help=f"the variant, if it cannot be detected: {', '.join((*variants(), CUSTOM))}")
    add("--prompt-format", choices=tuple(PROMPT_FORMATS), help="how a custom variant was trained to chat")
    add("--tokenizer", type=Path, metavar="FILE", help="tokenizer.model, if it is not in the weights folder")
    add("--card", type=Path, metavar="FILE", help="your own README.md instead of the filled-in one")
    add(
        "--local-dir",
        type=Path,
        metavar="FOLDER",
        help="where to assemble; without --repo-id nothing is uploaded (default: beside the weights, WEIGHTS-hub)",
    )
    add("--no-verify-local", action="store_true", help="check the files only, do not load the model")
    add = parser.add_argument_group("where to upload").add_argument
    add("--repo-id", metavar="NAMESPACE/NAME", help="the repository, created if it does not exist")
    add("--revision", default="main", help="branch, created if it does not exist (default: %(default)s)")
    add("--create-pr", action="store_true", help="open a pull request instead of committing to the branch")
    add("--public", action="store_true", help="make a new repository public (default: private)")
    add(
        "--dry-run",
        action="store_true",
        help="show the plan; assemble in a temporary folder (pickles are converted there), and write nothing else",
    )
    add("--yes", action="store_true", help="overwrite a repository that this tool did not create")
    add("--no-verify-remote", action="store_true", help="compare hashes only, do not download and load the commit")
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


def _run(arguments: argparse.Namespace) -> None:
    if not arguments.dry_run:
        return _run_steps(arguments)
    out = arguments.local_dir.absolute()
    check_out(out, arguments.weights)
    parent = next(folder for folder in out.parents if folder.is_dir())  # on the same disk, where links are possible
    try:
        temporary = tempfile.TemporaryDirectory(prefix=f"{out.name}-dry-run-", dir=parent)
    except OSError as error:
        raise errors.InputError(f"{parent}: {error.strerror}: give another --local-dir.") from error
    with temporary as folder:
        arguments.local_dir = Path(folder) / out.name
        _run_steps(arguments)
    print("Dry run: nothing was written.")


def _run_steps(arguments: argparse.Namespace) -> None:
    """The five steps; without --repo-id the first two."""
    if arguments.repo_id is None:
        assembly = _assemble(arguments, None)
        _verify_folder(assembly, arguments)
        if not arguments.dry_run:
            print(f"{assembly.out} is a complete repository of {assembly.variant}.")
        return

    from tools.hub.push import log_in

    api, repo_id = log_in(arguments.repo_id, arguments.revision, arguments.create_pr)
    assembly = _assemble(arguments, repo_id)
    local = _verify_folder(assembly, arguments)
    plan = _plan(api, repo_id, assembly, arguments)
    if arguments.dry_run:
        return
    commit = _upload(api, plan, assembly, arguments)
    _verify_commit(api, plan, commit, assembly, local, arguments)
    print(
        f'AutoModelForCausalLM.from_pretrained("{repo_id}", revision="{commit}", trust_remote_code=True, '
        'dtype="auto", device_map="auto")'
    )


# Step 1
def _assemble(arguments: argparse.Namespace, repo_id: str | None) -> Assembly:
    print(f"Assembling {arguments.local_dir}")
    assembly = assemble(
        arguments.weights,
        arguments.local_dir,
        arguments.variant,
        arguments.tokenizer,
        arguments.card,
        repo_id,
        prompt_format=arguments.prompt_format,
    )
    for note in assembly.notes:
        print(f"  - {note}")
    return assembly


# Step 2
def _verify_folder(assembly: Assembly, arguments: argparse.Namespace) -> Sample | None:
    check_files(assembly.out)
    if arguments.no_verify_local:
        print("The files are valid; the model was not loaded.")
        return None
    print("Loading it in a fresh process")
    local = check_loading(str(assembly.out))
    print(f"It loads and generates: tokens {local['tokens']}, sum of |logits| {local['logits']:.6g}")
    return local


# Step 3
def _plan(api: "HfApi", repo_id: str, assembly: Assembly, arguments: argparse.Namespace) -> "Plan":
    from tools.hub.push import fetch_target, make_plan

    target = fetch_target(api, repo_id, arguments.revision)
    plan = make_plan(assembly.out, assembly.files, target)
    kind = "private" if (target.private if target.exists else not arguments.public) else "public"
    print(f"Plan for {repo_id} ({kind}{'' if target.exists else ', new'}), revision {arguments.revision}:\n{plan}")
    return plan


# Step 4
def _upload(api: "HfApi", plan: "Plan", assembly: Assembly, arguments: argparse.Namespace) -> str:
    from tools.hub.push import TOOL, push

    _confirm(plan.target, arguments)
    before = signal.signal(signal.SIGINT, _exit_at_once)
    try:
        title = f"Upload {assembly.variant} with {TOOL}"
        return push(api, plan, title, not arguments.public, arguments.create_pr)
    finally:
        signal.signal(signal.SIGINT, before)
        print(file=sys.stderr)  # below the client's progress bars


def _confirm(target: "Target", arguments: argparse.Namespace) -> None:
    """Ask before overwriting files in a repository that this tool did not create."""
    if not target.foreign or arguments.yes or arguments.create_pr:
        return
    question = f"{target.repo_id} ({target.revision}) holds files, and was not created by this tool."
    if not sys.stdin.isatty() or input(f"{question} Overwrite? [y/N] ").strip().lower() not in ("y", "yes"):
        raise errors.NameTaken(f"{question} Choose another --repo-id, or overwrite its files with --yes.")


def _exit_at_once(*_: Any) -> None:
    # The client's threads would finish their files first, gigabytes later; complete files stay on the Hub.
    os.write(2, b"\nInterrupted: run the same command again to resume.\n")
    os._exit(errors.INTERRUPTED)


# Step 5
def _verify_commit(
    api: "HfApi", plan: "Plan", commit: str, assembly: Assembly, local: Sample | None, arguments: argparse.Namespace
) -> None:
    from tools.hub.push import check_hashes

    check_hashes(api, plan, commit)
    print(f"Uploaded: commit {commit}, whose hashes match the plan")
    if arguments.no_verify_remote:
        return
    repo_id, needed = plan.target.repo_id, sum((assembly.out / name).stat().st_size for name in assembly.files)
    if shutil.disk_usage(assembly.out.parent).free < needed:
        raise errors.DiskFull(
            f"{repo_id} is uploaded, but downloading and loading it takes {needed / 1e9:.1f} GB in "
            f"{assembly.out.parent}: make room and run the same command again, or add --no-verify-remote."
        )
    print("Loading it from the Hub in a fresh process")
    try:
        remote = check_loading(repo_id, commit, scratch=assembly.out.parent)
    except errors.LocalCheckFailed as error:
        raise errors.RemoteCheckFailed(str(error)) from error
    if local and not (
        remote["tokens"] == local["tokens"] and math.isclose(remote["logits"], local["logits"], rel_tol=1e-4)
    ):
        raise errors.RemoteCheckFailed(f"{repo_id} at {commit} differs from the folder: {remote}, {local}.")
    print("It loads from the Hub and generates the same tokens")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = _arguments(argv)
    try:
        _run(arguments)
        return 0
    except KeyboardInterrupt:
        message, code = "\nInterrupted: run the same command again to resume.", errors.INTERRUPTED
    except Exception as error:
        message, code = errors.report(error)
    print(message, file=sys.stderr)
    return code


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # in order with the progress bars, in a log file too
    sys.exit(main())


__all__ = ["Assembly", "assemble", "main"]
