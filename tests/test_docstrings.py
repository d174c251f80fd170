"""What `help` says of a public function must be there for whoever asks."""

import re
import types

import pytest

import ppo_kernels

FUNCTIONS = [
    x for x in ppo_kernels.__all__ if isinstance(getattr(ppo_kernels, x), types.FunctionType)
]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_a_docstring_points_to_can_be_reached(name):
    """`ppo_kernels.gae` and `ppo_kernels.ppo_loss` are functions, which hide their modules."""
    doc = getattr(ppo_kernels, name).__doc__
    assert "the module" not in doc
    for pointed in re.findall(r"`ppo_kernels\.(\w+)`", doc):
        assert isinstance(getattr(ppo_kernels, pointed), types.ModuleType)


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
