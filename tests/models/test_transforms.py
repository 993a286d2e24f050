"""Whole models under torch.func, held against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from vmamba.models.vmamba import VMamba
from vmamba.ops import use_backend

SMALL = {"depths": (1, 1), "dims": (4, 6), "stem_stride": 2, "num_classes": 2, "img_size": 8, "dtype": torch.float64}
VARIANTS = {
    "MLP": SMALL,
    "vanilla": SMALL | {
        "mlp_ratio": 0, "gated": True, "ssm_ratio": 2, "d_state": 2, "conv_bias": True, "stem": "patch",
        "downsample": "merge",
    },
}  # fmt: skip
WAYS = {
    "jvp": lambda f, x: jvp(f, (x,), (torch.cos(x),)),
    "linearize": lambda f, x: linearize(f, x)[1](torch.cos(x)),
    "vjp": lambda f, x: vjp(f, x)[1](torch.ones_like(f(x))),
    "jacrev": lambda f, x: jacrev(f)(x),
    "jacfwd": lambda f, x: jacfwd(f)(x),
    "hessian": lambda f, x: hessian(lambda v: f(x + v * torch.sin(x)).square().sum())(x.new_zeros(())),
    "vmap": lambda f, x: vmap(lambda image: f(image[None])[0])(x),
    "vmap of grad": lambda f, x: vmap(grad(lambda image: f(image[None]).square().sum()))(x),
}


# The same by other means, where the definition would take long.
EXPECTED = WAYS | {"linearize": lambda f, x: jvp(f, (x,), (torch.cos(x),))[1]}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_transforms_of_a_model(options, way):
    torch.manual_seed(0)
    model, x = VMamba(**options).eval(), torch.randn(2, 3, 8, 10, dtype=torch.float64)
    results = WAYS[way](model, x)
    with use_backend("reference"):
        torch.testing.assert_close(results, EXPECTED[way](model, x), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_gradients_of_the_parameters_of_each_image(options):
    torch.manual_seed(0)
    model, x = VMamba(**options).eval(), torch.randn(3, 3, 8, 8, dtype=torch.float64)
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def loss(parameters, image):
        return functional_call(model, parameters, (image[None],)).square().sum()

    each = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(3):
        expected = torch.autograd.grad(model(x[i : i + 1]).square().sum(), list(model.parameters()))
        torch.testing.assert_close([each[name][i] for name in parameters], list(expected), atol=1e-9, rtol=1e-9)
