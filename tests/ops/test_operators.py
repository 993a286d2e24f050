"""The registered operators: every way in which torch differentiates and transforms functions; torch's own checks."""

from __future__ import annotations

import pytest
import torch
from scans import FAST_BACKENDS, assert_matches, scan_arguments, ss2d_arguments
from torch.autograd import forward_ad, functional
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from vmamba.ops import PATTERNS, available_backends, cross_merge, cross_scan, selective_scan, ss2d_scan
from vmamba.ops.backends import eager

fast_backends = pytest.mark.parametrize("backend", [b for b in FAST_BACKENDS if available_backends()[b] is None])


def _grid(backend, pattern="cross"):
    """ss2d_scan as a function of all its tensors, and these."""
    return lambda *v: ss2d_scan(*v, pattern, backend=backend), ss2d_arguments(2, 2, 3, 3, 2, 2, torch.float64)


def _sequence(backend, names=("u", "delta", "A", "B", "C", "D", "z", "delta_bias"), softplus=True, constant=False):
    """The same for selective_scan, whose two results are one tensor here; B with `constant` the same at every step."""
    values = scan_arguments(2, 4, 5, 2, 2, torch.float64)
    if constant:
        values["B"] = torch.randn(4, 2, dtype=torch.float64)

    def run(*given):
        named = dict(zip(names, given, strict=True))
        y, last = selective_scan(**named, delta_softplus=softplus, return_last_state=True, backend=backend)
        return torch.cat((y, last), dim=-1)

    return run, [values[name] for name in names]


def _tangents(values):
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(v.shape, dtype=v.dtype, generator=generator) for v in values)


def _dual_numbers(function, values):
    with forward_ad.dual_level():
        y = function(*map(forward_ad.make_dual, values, _tangents(values)))
        return forward_ad.unpack_dual(y).tangent


def _at_several_u(function, values):
    u, *others = values
    return vmap(function, (0, *(None for _ in others)))(torch.stack((u, u.flip(0), 2 * u), dim=0), *others)


def _with_several_of_everything(function, values):
    dims = [v.ndim // 2 for v in values]
    stacked = [torch.stack((v, 0.5 * v), dim) for v, dim in zip(values, dims, strict=True)]
    return vmap(function, tuple(dims))(*stacked)


def _batched_gradients(function, values):
    leaves = [v.clone().requires_grad_() for v in values]
    y = function(*leaves)
    return torch.autograd.grad(y, leaves, torch.stack((torch.ones_like(y), y.detach())), is_grads_batched=True)


def _of_u(function, values):
    """A scalar function of the first argument."""
    return lambda u: (function(u, *values[1:]) ** 2).sum()


def _compiled_jvp(function, values):
    tangents = _tangents(values)
    return _compiled(lambda *v: jvp(function, v, tangents)[1])(*values)


def _compiled(function, fullgraph=True):
    return torch.compile(function, backend="aot_eager", fullgraph=fullgraph)


# Each from a function of several tensors and those tensors.
WAYS = {
    "jvp": lambda f, v: jvp(f, tuple(v), _tangents(v))[1],
    "jvp of the parameters alone": lambda f, v: jvp(lambda *p: f(v[0], *p), tuple(v[1:]), _tangents(v[1:]))[1],
    "dual numbers": _dual_numbers,
    "dual numbers without gradients": lambda f, v: torch.no_grad()(_dual_numbers)(f, v),
    "linearize": lambda f, v: linearize(f, *v)[1](*_tangents(v)),
    "vjp": lambda f, v: vjp(f, *v)[1](f(*v)),
    "jacfwd": lambda f, v: jacfwd(f, tuple(range(len(v))))(*v),
    "jacrev": lambda f, v: jacrev(f, tuple(range(len(v))))(*v),
    "vmap": _at_several_u,
    "vmap of everything": _with_several_of_everything,
    "vmap of grad": lambda f, v: vmap(grad(_of_u(f, v)))(torch.stack((v[0], -v[0]))),
    "hessian": lambda f, v: hessian(_of_u(f, v))(v[0]),
    "jacrev of jacrev": lambda f, v: jacrev(jacrev(_of_u(f, v)))(v[0]),
    "jvp of grad": lambda f, v: jvp(grad(_of_u(f, v)), (v[0],), _tangents(v[:1]))[1],
    "grad of jvp": lambda f, v: grad(lambda u: jvp(_of_u(f, v), (u,), _tangents(v[:1]))[1])(v[0]),
    "batched gradients": _batched_gradients,
    "hvp": lambda f, v: functional.hvp(_of_u(f, v), v[0], _tangents(v[:1])[0])[1],
    "vectorized hessian": lambda f, v: functional.hessian(_of_u(f, v), v[0], vectorize=True),
    "forward over reverse": lambda f, v: functional.hessian(
        _of_u(f, v), v[0], vectorize=True, outer_jacobian_strategy="forward-mode"
    ),
}
COMPILED_WAYS = {
    "compiled jvp": _compiled_jvp,
    "compiled grad": lambda f, v: _compiled(grad(_of_u(f, v)))(v[0]),
    "compiled vmap of grad": lambda f, v: _compiled(vmap(grad(_of_u(f, v))))(torch.stack((v[0], -v[0]))),
    "jvp of compiled": lambda f, v: jvp(_compiled(f, False), tuple(v), _tangents(v))[1],
    "grad of compiled": lambda f, v: grad(_compiled(_of_u(f, v), False))(v[0]),
    "dual numbers through compiled": lambda f, v: _dual_numbers(_compiled(f, False), v),
}


def _assert_as_the_definition(make, way, backend):
    results = []
    for name in (backend, "reference"):
        torch.manual_seed(0)
        result = way(*make(name))
        results.append([result] if isinstance(result, torch.Tensor) else list(result))
    assert_matches(*results, 1e-9)
    assert all(value.abs().max() > 0 for value in results[1])


@fast_backends
@pytest.mark.parametrize("make", [_grid, _sequence])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_differentiate(make, way, backend):
    _assert_as_the_definition(make, WAYS[way], backend)


# Through the compiler every backend is the same call, and it takes long.
DEFAULT = "native" if available_backends()["native"] is None else "eager"


@pytest.mark.parametrize("make", [_grid, _sequence])
@pytest.mark.parametrize("way", COMPILED_WAYS)
@pytest.mark.filterwarnings("ignore")
def test_every_way_through_the_compiler(make, way):
    torch.compiler.reset()
    _assert_as_the_definition(make, COMPILED_WAYS[way], DEFAULT)


@pytest.mark.parametrize("make", [_grid, _sequence])
@pytest.mark.filterwarnings("ignore")
def test_compiled_hessian(make):
    """In which every backend is the same chain of torch's functions, that take long to trace."""
    torch.compiler.reset()
    _assert_as_the_definition(make, lambda f, v: _compiled(hessian(_of_u(f, v)))(v[0]), "eager")


@pytest.mark.parametrize("way", [*WAYS, "compiled vmap of grad"])
@pytest.mark.filterwarnings("ignore")
def test_every_way_along_routes_that_no_kernel_knows(way):
    torch.compiler.reset()
    _assert_as_the_definition(lambda name: _grid(name, "diagonal"), {**WAYS, **COMPILED_WAYS}[way], DEFAULT)


_VARIANTS = {
    **{pattern: lambda backend, pattern=pattern: _grid(backend, pattern) for pattern in PATTERNS},
    "no options": lambda backend: _sequence(backend, ("u", "delta", "A", "B", "C"), softplus=False),
    "no gate": lambda backend: _sequence(backend, ("u", "delta", "A", "B", "C", "D", "delta_bias")),
    "no skip": lambda backend: _sequence(backend, ("u", "delta", "A", "B", "C", "z"), softplus=False),
    "constant B": lambda backend: _sequence(backend, constant=True),
}


@fast_backends
@pytest.mark.parametrize("way", ["jvp", "vmap of grad", "jvp of grad", "jacrev"])
@pytest.mark.parametrize("variant", _VARIANTS)
def test_every_variant(variant, way, backend):
    _assert_as_the_definition(_VARIANTS[variant], WAYS[way], backend)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_scan_and_merge_are_linear_in_every_way(pattern):
    x, t = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    for function in (lambda x: cross_scan(x, pattern), lambda x: cross_merge(cross_scan(x, pattern), (4, 5), pattern)):
        assert torch.equal(jvp(function, (x,), (t,))[1], function(t))
        assert torch.equal(vmap(function)(torch.stack((x, t))), torch.stack((function(x), function(t))))
        assert torch.equal(jacfwd(function)(x), jacrev(function)(x))
        assert not hessian(lambda x, f=function: f(x).sum())(x).any()


# --- torch's own checks ----------------------------------------------------------------------------------------------


def _leaves(values, is_recorded):
    return [v if v is None else v.detach().requires_grad_(is_recorded) for v in values]


def _opcheck(operator, arguments, compiled):
    """To the compiler, which takes most of the time, every backend is the same call."""
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if compiled and arguments[-1] == "eager":
        checks.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(operator, arguments, test_utils=checks)


# (batch, D, L, N, G)
@fast_backends
@pytest.mark.parametrize("is_recorded", [True, False])
@pytest.mark.parametrize("shape", [(2, 4, 4, 2, 2), (1, 1, 1, 1, 1), (0, 4, 4, 2, 2), (2, 4, 0, 2, 2), (2, 4, 4, 0, 2)])
def test_opcheck_of_a_sequence(backend, shape, is_recorded):
    batch, channels, length, states, _ = shape
    values = scan_arguments(*shape, torch.float64)
    grads = torch.randn(batch, channels, length).double(), torch.randn(batch, channels, states).double()
    given = [values.get(name) for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
    for tensors in (given, [*given[:5], None, None, None]):
        compiled = tensors is given and shape == (2, 4, 4, 2, 2)
        _opcheck(torch.ops.vmamba.selective_scan, (*_leaves(tensors, is_recorded), True, backend), compiled)
        arguments = (*_leaves((*grads, *tensors), is_recorded), True, backend)
        _opcheck(torch.ops.vmamba.selective_scan_backward, arguments, compiled and not is_recorded)


# (batch, H, W, D, N, R)
@fast_backends
@pytest.mark.parametrize("is_recorded", [True, False])
@pytest.mark.parametrize(
    "shape", [(1, 2, 3, 4, 2, 1), (0, 2, 3, 4, 2, 1), (1, 0, 3, 4, 2, 1), (1, 2, 3, 4, 0, 1), (1, 2, 3, 4, 2, 0)]
)
def test_opcheck_of_a_grid(backend, shape, is_recorded):
    batch, height, width, channels, states, rank = shape
    u, projected, grad_y = (
        torch.randn(batch, height, width, *size).double() for size in ((channels,), (4, rank + 2 * states), (channels,))
    )
    parameters = [torch.randn(4, channels, *size).double() for size in ((rank,), (), (states,), ())]
    parameters[2] = -parameters[2].abs()
    values = _leaves((grad_y, u, projected, *parameters), is_recorded)
    compiled = shape == (1, 2, 3, 4, 2, 1)
    _opcheck(torch.ops.vmamba.ss2d_scan, (*values[1:], "cross", backend), compiled)
    _opcheck(torch.ops.vmamba.ss2d_scan_backward, (*values, "cross", backend), compiled and not is_recorded)


@pytest.mark.parametrize("is_recorded", [True, False])
def test_opcheck_of_a_permutation(is_recorded):
    order = torch.randperm(5)
    (x,) = _leaves([torch.randn(2, 5, 3, dtype=torch.float64)], is_recorded)
    torch.library.opcheck(torch.ops.vmamba.permute, (x, order, order.argsort(), 1))
    torch.library.opcheck(torch.ops.vmamba.scan_orders, ("spiral", 2, 3, x.device))


@fast_backends
def test_opcheck_of_expanded_memory(backend):
    values = scan_arguments(2, 4, 7, 2, 2, torch.float64)
    expanded = [v[(slice(1),) * v.ndim].expand(v.shape) for v in values.values()]
    torch.library.opcheck(torch.ops.vmamba.selective_scan, (*_leaves(expanded, True), True, backend))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_on_the_meta_device_nothing_is_computed(mode, monkeypatch):
    monkeypatch.setattr(eager, "ss2d_scan", None)
    monkeypatch.setattr(eager, "selective_scan", None)
    grid = [value.to("meta") for value in ss2d_arguments(1, 512, 512, 96, 16, 6)]
    sequence = {name: value.to("meta") for name, value in scan_arguments(1, 4, 7, 2, 2).items()}
    with mode():
        assert ss2d_scan(*grid).shape == (1, 512, 512, 96)
        assert selective_scan(**sequence, delta_softplus=True).shape == (1, 4, 7)


@fast_backends
def test_a_gradient_that_nobody_asks_for(backend):
    """Of y alone, of the last state alone, and for some of the arguments."""
    for place in (0, 1):
        results = []
        for name in (backend, "reference"):
            torch.manual_seed(0)
            values = scan_arguments(2, 4, 7, 2, 2, torch.float64)
            leaves = {n: v.requires_grad_(n in ("A", "B")) for n, v in values.items()}
            y = selective_scan(**leaves, return_last_state=True, delta_softplus=True, backend=name)[place]
            results.append(list(torch.autograd.grad(y.sum(), (leaves["A"], leaves["B"]))))
        assert_matches(*results, 1e-9)
