"""What a test could leave behind for the next one: compared before and after every test by tests/conftest.py."""

import os
import signal

import torch
from torch.nn.modules import module as nn_module
from transformers.utils import logging


# Other variables are set by libraries, when they are imported or first used.
_VARIABLES = ("HF_", "HOME", "OMP_", "PATH", "PYTHON", "TRANSFORMERS_")


def process_state() -> dict[str, object]:
    """Settings of the whole process."""
    environment = {name: value for name, value in os.environ.items() if name.startswith(_VARIABLES)}
    state: dict[str, object] = {f"os.environ[{name!r}]": value for name, value in environment.items()}
    return state | {
        "os.getcwd()": os.getcwd(),
        "the handler of SIGINT": signal.getsignal(signal.SIGINT),
        "transformers' verbosity": logging.get_verbosity(),
        "transformers' progress bars": logging.is_progress_bar_enabled(),
        "torch's default dtype": torch.get_default_dtype(),
        "torch's gradients": torch.is_grad_enabled(),
        "torch's threads": torch.get_num_threads(),
        "torch's global hooks": len(nn_module._global_forward_hooks) + len(nn_module._global_forward_pre_hooks),
    }


def model_state(model: torch.nn.Module) -> dict[str, object]:
    """Configuration, modules and parameters of a model that tests share; writing to a parameter counts its version."""
    state: dict[str, object] = {}
    for name in ("config", "generation_config"):
        if settings := getattr(model, name, None):
            state |= {f"{name}.{key}": value for key, value in settings.to_dict().items()}
            state[f"{name}._attn_implementation"] = getattr(settings, "_attn_implementation", None)
    for name, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        hooks = [id(hook) for hook in hooks if "output_capturing" not in hook.__module__]  # transformers keeps its own
        state[f"module {name!r}"] = id(module), type(module), module.training, hooks
    for name, parameter in model.named_parameters():
        state[name] = id(parameter), parameter._version, parameter.requires_grad, parameter.grad is not None
    return state


def changes(before: dict[str, object], after: dict[str, object]) -> list[str]:
    """One line for each difference."""
    missing = object()
    return [
        f"{name} was {before.get(name)!r} and is {after.get(name)!r}"
        for name in before | after
        if before.get(name, missing) != after.get(name, missing)
    ]
