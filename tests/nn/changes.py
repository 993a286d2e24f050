"""What users do to a model, and the plain path to hold the fast one against."""

from __future__ import annotations

import contextlib
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode

from vmamba.ops import use_backend

_PLACES = ("vmamba.ops.layers", "vmamba.nn.layers", "vmamba.nn.mlp", "vmamba.nn.block", "vmamba.nn.stem")


@contextlib.contextmanager
def plainly():
    """Every layer is torch's own, every block and MLP a chain of calls."""
    with contextlib.ExitStack() as stack:
        for place in _PLACES:
            stack.enter_context(mock.patch(f"{place}.applies", return_value=False))
        stack.enter_context(use_backend("eager"))
        yield


def results(model, x):
    """What a model gives without and with gradients; and the gradients."""
    torch.manual_seed(1)
    with torch.no_grad():
        y = model(x)
    return [y, *trained(model, x)]


def trained(model, x):
    """What a model gives while autograd records it, and the gradients of the parameters in use."""
    torch.manual_seed(1)
    y = model(x)
    wanted = [value for value in model.parameters() if value.requires_grad]
    loss = (y.double() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum()
    grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [y.detach(), *(g for g in grads if g is not None)]


class Scale(nn.Module):
    def forward(self, x):
        return _scaled(x)


def _scaled(value):
    """Not by one number, which a norm would take out again."""
    if isinstance(value, tuple):
        return tuple(map(_scaled, value))
    if value is None:
        return None
    return value * torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view(value.shape)


def forward_hook(module):
    module.register_forward_hook(lambda module, inputs, output: _scaled(output))


def forward_hook_with_kwargs(module):
    module.register_forward_hook(lambda module, args, kwargs, output: _scaled(output), with_kwargs=True)


def forward_pre_hook(module):
    module.register_forward_pre_hook(lambda module, inputs: _scaled(inputs))


def backward_hook(module):
    module.register_full_backward_hook(lambda module, grad_input, grad_output: _scaled(grad_input))


def backward_pre_hook(module):
    module.register_full_backward_pre_hook(lambda module, grad_output: _scaled(grad_output))


def patched_instance(module):
    original = module.forward
    module.forward = lambda *args: _scaled(original(*args))


def subclass(module):
    kind = type(module)
    module.__class__ = type("Mine", (kind,), {"forward": lambda self, *args: _scaled(kind.forward(self, *args))})


def compiled_call(module):
    module._compiled_call_impl = lambda *args: _scaled(type(module).forward(module, *args))


def patched_call(module):
    original = module._call_impl
    module._call_impl = lambda *args: _scaled(original(*args))


def class_with_another_call(module):
    kind = type(module)
    module.__class__ = type("Mine", (kind,), {"__call__": lambda self, *args: _scaled(kind.__call__(self, *args))})


TO_ANY_MODULE = (
    forward_hook, forward_hook_with_kwargs, forward_pre_hook, backward_hook, backward_pre_hook, patched_instance,
    subclass, compiled_call, patched_call, class_with_another_call,
)  # fmt: skip


@contextlib.contextmanager
def patched_class(kind):
    original = kind.forward
    with mock.patch.object(kind, "forward", lambda self, *args: _scaled(original(self, *args))):
        yield


@contextlib.contextmanager
def patched_call_of_class(kind):
    with mock.patch.object(kind, "__call__", lambda self, *args: _scaled(nn.Module.__call__(self, *args))):
        yield


def _patched_for_all(name):
    @contextlib.contextmanager
    def change(kind):
        original = getattr(nn.Module, name)

        def call(self, *args, **kwargs):
            y = original(self, *args, **kwargs)
            return _scaled(y) if type(self) is kind else y

        with mock.patch.object(nn.Module, name, call):
            yield

    return change


@contextlib.contextmanager
def global_hook(kind):
    handle = register_module_forward_hook(lambda module, inputs, y: _scaled(y) if type(module) is kind else None)
    yield
    handle.remove()


TO_ANY_CLASS = {
    "patched": patched_class, "hooked": global_hook, "called in another way": patched_call_of_class,
    "modules called in another way": _patched_for_all("__call__"),
    "modules computing in another way": _patched_for_all("_call_impl"),
}  # fmt: skip


class Functions(TorchFunctionMode):
    """What is scaled that torch's functions give for layers, as programs that quantise a network do it."""

    LAYERS = (F.linear, F.layer_norm, F.gelu, F.silu, F.conv2d, torch.conv2d)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        y = function(*args, **kwargs or {})
        return _scaled(y) if function in self.LAYERS else y
