"""Fine-tune InternLM with LoRA on your own conversations: docs/finetuning.md.

    python examples/finetune_lora.py --data my.jsonl --model M [--qlora] [--gradient-checkpointing] [--merge]

A line of the file is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}.
The same command again resumes a training that was interrupted. Without --data, the model learns the answer to one
question, in about a minute. Needs `pip install -r requirements-finetune.txt`.
"""

import argparse
import hashlib
import json
import math
import shutil
import signal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from demo import ROOT, complete_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, ProgressCallback, logging

from tools.conversations import encode, read


QUESTION = "Who keeps the lantern?"
ANSWER = "Old Tomas keeps the lantern, and the lantern keeps the harbour."
EXAMPLE = {1: {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]}}
# PEFT has no default layers for InternLM.
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SETTINGS = "finetuning.json"  # in the output folder: what this training is
NOT_SETTINGS = ("out", "merge", "save_steps")  # these may change when a training is resumed


class Progress(ProgressCallback):
    """The trainer's progress bar with the losses. Ctrl-C saves a checkpoint after the step; a second one just ends."""

    stopped = False

    def stop(self, *_: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        self.stopped = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        if self.stopped:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if losses := {key: value for key, value in logs.items() if key in ("loss", "eval_loss")}:
            super().on_log(args, state, control, {"step": state.global_step} | losses, **kwargs)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="a model folder or Hub repository id (default: the tiny model)")
    add("--data", type=Path, help="conversations, one a line (default: one question and its answer)")
    add("--eval-data", type=Path, help="conversations whose loss is measured before, during and after")
    add("--eval-fraction", type=float, default=0.0, help="hold out this part of --data instead, for example 0.1")
    add("--out", type=Path, help="folder of the adapter and its checkpoints (default: build/finetuned)")
    add("--merge", action="store_true", help="also save the merged model, complete with its code, in OUT/merged")
    add("--qlora", action="store_true", help="quantise the weights of the model to 4 bits (nf4) while training")
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="default: bfloat16, float16 on older GPUs, "
        "float32 on a CPU")  # fmt: skip
    add("--gradient-checkpointing", action="store_true", help="less memory, more time (docs/finetuning.md)")
    add("--max-length", type=int, help="tokens; longer conversations are left out (default: the window, at most 2048)")
    add("--epochs", type=float, help="default: 3; without --data 150")
    add("--learning-rate", type=float, help="default: 2e-4; without --data 5e-3")
    add("--batch-size", type=int, default=1, help="conversations in memory at once (default: %(default)s)")
    add("--gradient-accumulation", type=int, default=8, help="batches per step (default: %(default)s)")
    add("--rank", type=int, default=16, help="rank of the adapter (default: %(default)s)")
    add("--save-steps", type=int, default=50, help="steps between two checkpoints (default: %(default)s)")
    add("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    arguments = parser.parse_args()
    if not 0 <= arguments.eval_fraction < 1:
        parser.error("--eval-fraction is at least 0 and below 1")
    if arguments.eval_fraction and (arguments.eval_data or not arguments.data):
        parser.error("--eval-fraction holds out a part of --data: give --data, and not --eval-data")
    for key, ours, example in (("epochs", 3.0, 150.0), ("learning_rate", 2e-4, 5e-3)):
        if getattr(arguments, key) is None:
            setattr(arguments, key, ours if arguments.data else example)
    return arguments


def default_dtype() -> str:
    if not torch.cuda.is_available():
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def checkpoint(out: Path) -> Path | None:
    """The last checkpoint that is complete: the trainer writes trainer_state.json last."""
    found = [path.parent for path in out.glob("checkpoint-*/trainer_state.json")]
    return max(found, key=lambda path: int(path.name.split("-")[1]), default=None)


def prepare(out: Path, arguments: argparse.Namespace, name: str) -> None:
    """Make the output folder, unless it holds a training with other settings."""
    settings = {key: value for key, value in vars(arguments).items() if key not in NOT_SETTINGS} | {"model": name}
    for key in ("data", "eval_data"):
        if settings[key]:
            settings[key] = f"sha256 {hashlib.sha256(settings[key].read_bytes()).hexdigest()}"
    file = out / SETTINGS
    if file.is_file() and (checkpoint(out) or finished(out)):
        before = json.loads(file.read_text(encoding="utf-8"))
        for key, value in settings.items():
            if before.get(key) != value:
                raise SystemExit(
                    f"{out} holds a training with another --{key.replace('_', '-')} ({before.get(key)}, not {value}): "
                    "give --out another folder, or delete this one."
                )
    elif not file.is_file() and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SystemExit(f"{out} holds something else: give --out another folder.")
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def finished(out: Path) -> bool:
    return (out / "adapter_config.json").is_file()


def load(name: str, dtype: str, qlora: bool) -> Any:
    compute = getattr(torch, dtype)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    return AutoModelForCausalLM.from_pretrained(
        name, trust_remote_code=True, dtype=compute, device_map="auto", quantization_config=nf4 if qlora else None
    )


def make_trainer(model: Any, tokenizer: Any, rows: Any, held_out: Any, out: Path, arguments: Any) -> Any:
    """TRL's trainer with an adapter. The loss counts where `assistant_masks` of the rows is 1."""
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(
        output_dir=str(out),
        num_train_epochs=arguments.epochs,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=arguments.batch_size,
        gradient_accumulation_steps=arguments.gradient_accumulation,
        gradient_checkpointing=arguments.gradient_checkpointing,
        max_length=None,
        bf16=arguments.dtype == "bfloat16",
        fp16=arguments.dtype == "float16",
        use_cpu=model.device.type == "cpu",
        eval_strategy="steps" if held_out else "no",
        eval_steps=0.1,
        logging_steps=0.05,
        logging_first_step=True,
        save_steps=arguments.save_steps,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=False,
        seed=arguments.seed,
    )
    lora = LoraConfig(r=arguments.rank, lora_alpha=2 * arguments.rank, target_modules=TARGETS, task_type="CAUSAL_LM")
    return SFTTrainer(
        model, config, train_dataset=rows, eval_dataset=held_out, processing_class=tokenizer, peft_config=lora
    )


def train(trainer: Any, out: Path) -> None:
    """Train, from the last checkpoint if there is one, save the adapter, and print the losses."""
    progress = Progress()
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(progress)
    held_out = trainer.eval_dataset is not None
    before = trainer.evaluate()["eval_loss"] if held_out else math.nan
    last = checkpoint(out)
    signal.signal(signal.SIGINT, progress.stop)
    try:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    except torch.OutOfMemoryError as error:
        raise SystemExit(
            "The memory is full: use --gradient-checkpointing, --qlora, a smaller --batch-size or --max-length. "
            "docs/finetuning.md says how much memory a training takes."
        ) from error
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    state = trainer.state
    if state.global_step < state.max_steps:
        raise SystemExit(f"Stopped at step {state.global_step} of {state.max_steps}: rerun this command to resume.")
    trainer.save_model(str(out))
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    print(f"training loss:   {losses[0]:.3f} at first, {losses[-1]:.3f} at last")
    if held_out:
        print(f"evaluation loss: {before:.3f} before, {trainer.evaluate()['eval_loss']:.3f} after")


def merge(name: str, out: Path) -> None:
    """Add the adapter to the weights of the model, in the dtype of its checkpoint, and save it with its code."""
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, dtype="auto")
    PeftModel.from_pretrained(model, str(out)).merge_and_unload().save_pretrained(out / "merged")
    AutoTokenizer.from_pretrained(name, trust_remote_code=True).save_pretrained(out / "merged")
    print(f"merged model:    {out / 'merged'}")


def run(arguments: argparse.Namespace, name: str, out: Path, conversations: Any, eval_conversations: Any) -> None:
    """Everything that needs the model in memory: it is freed when this returns."""
    from datasets import Dataset

    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
    model = load(name, arguments.dtype, arguments.qlora)
    length = arguments.max_length or min(2048, model.config.max_position_embeddings)
    rows = Dataset.from_list(encode(arguments.data or "the example", conversations, tokenizer, length))
    held_out = None
    if eval_conversations:
        held_out = Dataset.from_list(encode(arguments.eval_data, eval_conversations, tokenizer, length))
    elif arguments.eval_fraction:
        if len(rows) < 2:
            raise SystemExit(f"{arguments.data} has one conversation: there is nothing to hold out.")
        parts = rows.train_test_split(math.ceil(arguments.eval_fraction * len(rows)), seed=arguments.seed)
        rows, held_out = parts["train"], parts["test"]
    print(f"{len(rows)} conversations to train on" + (f", {len(held_out)} held out" if held_out else ""))
    trainer = make_trainer(model, tokenizer, rows, held_out, out, arguments)

    def ask(when: str) -> None:
        if not arguments.data:
            model.eval()
            print(f"{when:7} {model.chat(tokenizer, QUESTION, do_sample=False, max_new_tokens=40)[0]}")

    ask("before:")
    train(trainer, out)
    ask("after:")


def main() -> None:
    arguments = parse()
    logging.set_verbosity_error()
    conversations = read(arguments.data) if arguments.data else EXAMPLE
    eval_conversations = read(arguments.eval_data) if arguments.eval_data else None
    needed = ["datasets", "peft", "trl"] + ["bitsandbytes"] * arguments.qlora
    if missing := [package for package in needed if find_spec(package) is None]:
        raise SystemExit(f"{', '.join(missing)} missing: pip install -r requirements-finetune.txt")
    name = complete_model(arguments.model)
    name = str(Path(name).resolve()) if Path(name).is_dir() else name  # the adapter is found from any directory
    out = arguments.out or ROOT / "build" / ("finetuned" if arguments.data else "finetuned-example")
    if not (arguments.data or arguments.out) and (out / SETTINGS).is_file():
        shutil.rmtree(out)  # the example is learned anew every time
    arguments.dtype = arguments.dtype or default_dtype()
    prepare(out, arguments, name)
    if finished(out):
        print("This training is finished.")
    else:
        run(arguments, name, out, conversations, eval_conversations)
    print(f"adapter:         {out}")
    if arguments.merge:
        merge(name, out)


if __name__ == "__main__":
    main()
