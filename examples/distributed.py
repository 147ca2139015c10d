"""One model over several processes: torchrun --nproc-per-node 2 examples/distributed.py --way tensor

`tensor` splits every layer, `pipeline` distributes the layers, `fsdp` shards every parameter and gives each process
its own rows of the batch. The backend is NCCL on GPUs, else gloo; the command is the same.
`--check` compares logits, greedy tokens and gradients with one process, in float32, and fails if they differ.
"""

import argparse
import os
from typing import Any

import torch
import torch.distributed as dist
from demo import complete_model
from torch.distributed.pipelining import ScheduleGPipe, SplitPoint, pipeline
from transformers import AutoModelForCausalLM, AutoTokenizer, logging
from transformers.distributed import DistributedConfig


WAYS = {
    "tensor": lambda size: DistributedConfig(tp_plan="auto", tp_size=size),
    "pipeline": lambda size: DistributedConfig(pp_size=size),
    "fsdp": lambda size: DistributedConfig(fsdp_size=size),
}
PROMPTS = ("Coming to the beautiful nature, we found", "来到美丽的大自然，我们发现")
# Measured differences are 2e-5 and 4e-7 (docs/compatibility.md): rounding, from a different order of additions.
LOGITS, GRADIENTS = 1e-4, 1e-6


def load(name: str, **settings: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, **settings)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor, where each process may hold only a shard."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def own_rows(batch: torch.Tensor, way: str) -> torch.Tensor:
    """FSDP is data parallel: each process gets its own rows. Otherwise all processes get the whole batch."""
    return batch.chunk(dist.get_world_size())[dist.get_rank()] if way == "fsdp" else batch


def token_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def pipelined(model: Any, ids: torch.Tensor) -> torch.nn.Module:
    """Train one step with torch's pipeline, one row per microbatch: transformers' has no backward pass (5.23)."""
    size, layers = dist.get_world_size(), model.config.num_hidden_layers
    cuts = {f"model.layers.{layers * stage // size}": SplitPoint.BEGINNING for stage in range(1, size)}
    model.config.use_cache = False
    stage = pipeline(model, mb_args=(ids[:1],), split_spec=cuts).build_stage(dist.get_rank(), model.device)
    schedule = ScheduleGPipe(stage, n_microbatches=len(ids), loss_fn=token_loss)
    schedule.step(*([ids] if stage.is_first else []), **({"target": ids} if stage.is_last else {}))
    return stage.submod


def check(name: str, way: str, model: Any, generated: torch.Tensor, batch: torch.Tensor) -> str:
    """Compare with one process. Returns the differences as text; AssertionError if they are too large."""
    reference = load(name, dtype=torch.float32).to(model.device)
    mine = own_rows(batch, way)
    tokens = reference.generate(mine, max_new_tokens=24, do_sample=False)
    assert generated.tolist() == tokens.tolist(), f"{way}: the tokens differ from those of one process"
    with torch.no_grad():
        logits = (whole(model(mine).logits) - reference(mine).logits).abs().max().item()
    if way == "pipeline":
        model = pipelined(load(name, dtype=torch.float32).to(model.device), batch)
    else:
        model(mine, labels=mine).loss.backward()
    reference(batch, labels=batch).loss.backward()
    expected = {key: parameter.grad for key, parameter in reference.named_parameters()}
    found = {key: whole(parameter.grad) for key, parameter in model.named_parameters()}
    assert found and (way == "pipeline" or found.keys() == expected.keys())
    gradients = max((gradient - expected[key]).abs().max().item() for key, gradient in found.items())
    assert logits < LOGITS and gradients < GRADIENTS, f"{way}: logits {logits:.1e}, gradients {gradients:.1e} off"
    return f"same tokens as one process; logits within {logits:.1e}, {len(found)} gradients within {gradients:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--way", choices=WAYS, required=True)
    parser.add_argument("--model", help="a model folder or Hub repository id (default: the tiny model)")
    parser.add_argument("--length", type=int, default=250, help="tokens per prompt (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="compare with one process, in float32")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    names = [complete_model(arguments.model) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(names)
    name = str(names[0])
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
    dtype = torch.float32 if arguments.check else "auto"
    model = load(name, dtype=dtype, distributed_config=WAYS[arguments.way](dist.get_world_size()))
    texts = [PROMPTS[row % 2] * arguments.length for row in range(max(2, dist.get_world_size()))]
    batch = torch.tensor([tokenizer(text)["input_ids"][: arguments.length] for text in texts], device=model.device)
    mine = own_rows(batch, arguments.way)
    generated = model.generate(mine, max_new_tokens=24, do_sample=False)
    print(f"{arguments.way}, process {dist.get_rank()}: {tokenizer.decode(generated[0, mine.shape[1] :])}", flush=True)
    if arguments.check:
        result = check(name, arguments.way, model, generated, batch)
        print(f"{arguments.way}, process {dist.get_rank()}: {result}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
