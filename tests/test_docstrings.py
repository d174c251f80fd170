"""What `help` says of a public function must be there for whoever asks, its types too."""

import importlib.resources
import inspect
import re
import types

import pytest

import ppo_kernels
from ppo_kernels import integrations, objectives

FUNCTIONS = [
    x for x in ppo_kernels.__all__ if isinstance(getattr(ppo_kernels, x), types.FunctionType)
]
OF_PEERS = [
    function
    for peer in integrations._PEERS.values()
    for functions in peer.REPLACES.values()
    for function in functions
]
TYPED = [
    *(getattr(ppo_kernels, name) for name in FUNCTIONS),
    *objectives.OBJECTIVES.values(),
    *objectives.AGGREGATIONS.values(),
    *OF_PEERS,
    integrations.patch.enable,
    integrations.patch.disable,
]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_a_docstring_points_to_can_be_reached(name):
    """`ppo_kernels.gae` and `ppo_kernels.ppo_loss` are functions, which hide their modules."""
    doc = getattr(ppo_kernels, name).__doc__
    assert "the module" not in doc
    for pointed in re.findall(r"`ppo_kernels\.(\w+)`", doc):
        assert isinstance(getattr(ppo_kernels, pointed), types.ModuleType)


@pytest.mark.parametrize("function", TYPED, ids=lambda x: f"{x.__module__}.{x.__name__}")
def test_public_functions_are_annotated(function):
    signature = inspect.signature(function)
    annotations = {name: x.annotation for name, x in signature.parameters.items() if name != "self"}
    annotations["its result"] = signature.return_annotation
    assert [name for name, x in annotations.items() if x is inspect.Signature.empty] == []


@pytest.mark.parametrize("package", ["ppo_kernels", "rlhf"])
def test_type_checkers_read_the_annotations(package):
    assert importlib.resources.files(package).joinpath("py.typed").is_file()


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("gae", "δ_t = r_t + γ V_{t+1} - V_t        A_t = δ_t + γ λ A_{t+1}"),
        ("ppo_loss", "max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))"),
        ("ppo_loss", "policy - entropy_coef H + kl_coef kl(logprob, ref_logprob)"),
    ],
)
def test_a_function_that_hides_its_module_has_the_formula(name, formula):
    assert formula in getattr(ppo_kernels, name).__doc__
