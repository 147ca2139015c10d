"""Ways of changing what a linear layer computes, for tests that such changes are seen."""

from torch import nn


def double(module, inputs, output):
    return output * 2 if isinstance(module, nn.Linear) else None


class Doubled(nn.Linear):
    def forward(self, states):
        return super().forward(states) * 2


class DoubledWeight(nn.Parameter):
    """As quantised and sharded weights are: a subclass of Parameter that knows how to multiply."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        return result * 2 if function is nn.functional.linear else result


def replace_forward(layer):
    layer.forward = lambda states: nn.Linear.forward(layer, states) * 2


def replace_class(layer):
    layer.__class__ = Doubled


def replace_weight(layer):
    layer.weight = DoubledWeight(layer.weight.detach())


# Each returns None or a handle with `remove`.
CHANGES = {
    "hook": lambda layer: layer.register_forward_hook(double),
    "pre-hook": lambda layer: layer.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2,)),
    "global hook": lambda layer: nn.modules.module.register_module_forward_hook(double),
    "global pre-hook": lambda layer: nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: (inputs[0] * 2,) if module is layer else None
    ),
    "forward": replace_forward,
    "class": replace_class,
    "weight": replace_weight,
}
