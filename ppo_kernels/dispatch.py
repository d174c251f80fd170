"""Which backend runs a call, and why one cannot."""

import functools
import importlib
import math
import os
import warnings

import torch

from ppo_kernels import schemas

BACKENDS = ("reference", "native", "triton")

# In this order, by device type; where a device is not listed only `reference` runs.
# cpu: benchmarks/results/ has the ops that sweep a vocabulary or time; those of a few numbers per
# token are not measured there, and on millions of tokens plain PyTorch can be ahead.
# cuda (NVIDIA and AMD): not measured yet. What the kernels read and write speaks for both; Triton
# comes first until a benchmark on a GPU, `make gpu`, says for which ops native is to.
AUTO = {"cpu": ("native", "reference"), "cuda": ("triton", "native", "reference")}

# Triton's own switch: its kernels then run on the CPU too, slowly, to be tested.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _load_native():
    """Load `_C`, which registers the C++ kernels. Returns the reason when it cannot be loaded."""
    try:
        importlib.import_module("ppo_kernels._C")
    except ImportError as error:
        reason = f"the C++ extension ppo_kernels._C is not built or does not load: {error}"
        _warn("native", "CPU", reason)
        return reason
    return None


def _warn(backend, device, reason):
    warnings.warn(
        f"ppo_kernels: no {backend} backend, ops run on plain PyTorch, many times slower on the "
        f"{device} ({reason})",
        stacklevel=2,
    )


def build_info():
    """How the C++ extension was built (a dict); None without it."""
    if _MISSING["native"] is not None:
        return None
    return importlib.import_module("ppo_kernels._C").build_info()


def _load_triton():
    """Load `_triton`, which registers its kernels. Returns the reason when it cannot be loaded."""
    if torch.version.cuda is None and torch.version.hip is None and not INTERPRETED:
        return "this PyTorch is built without CUDA and ROCm"
    try:
        importlib.import_module("ppo_kernels._triton")
    except ImportError as error:
        reason = f"Triton is not installed or does not load: {error}"
        # Whether the native kernels are compiled for this very GPU is asked later, because to ask
        # initialises CUDA, and then no process may fork.
        info = build_info()
        if torch.cuda.is_available() and not (info and info["cuda_archs"]):
            _warn("triton", "GPU", reason)
        return reason
    return None


schemas.define("native")
schemas.define("triton")
# At import, not at the first call, so that torch.compile traces no import.
_MISSING = {"reference": None, "native": _load_native()}
_MISSING["triton"] = _load_triton()
_DEVICES = {"native": ("cpu", "cuda"), "triton": ("cuda", "cpu") if INTERPRETED else ("cuda",)}


def runs_on(arch, capability):
    """Whether code for `arch`, sm_XY or compute_XY, runs on a GPU of that compute capability.

    Machine code runs from its minor version on within the major one, and PTX on all that is later;
    what is specific to an architecture (a name that ends in a) runs on that only.
    """
    kind, _, version = arch.partition("_")
    number = version.rstrip("a")
    of_arch = int(number[:-1]), int(number[-1])
    if number != version:
        return capability == of_arch
    return capability >= of_arch and (kind == "compute" or capability[0] == of_arch[0])


@functools.cache
def _why_no_cuda(device_index):
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    archs = build_info()["cuda_archs"]
    if not archs:
        return (
            "it is built without CUDA sources: install it again where there is an nvcc of the same "
            "CUDA major version as torch; with FORCE_CUDA=1 that says what is missing"
        )
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU"
    capability = torch.cuda.get_device_capability(device_index)
    if any(runs_on(arch, capability) for arch in archs):
        return None
    return (
        f"it is compiled for {', '.join(archs)}, none of which runs on a GPU of compute "
        f"capability {capability[0]}.{capability[1]}: TORCH_CUDA_ARCH_LIST names others when it is "
        "installed"
    )


def _why_not_native_on_cuda(device_index):
    return _why_no_cuda(device_index)


# torch.compile calls it while it traces and keeps the answer: torch.compiler.assume_constant_result
# sets this too, but imports all of torch._dynamo, ten times what this package costs otherwise.
_why_not_native_on_cuda._dynamo_marked_constant = True  # type: ignore[attr-defined]


def why_not(backend, device_type, device_index=None):
    """Why `backend` cannot run on tensors of this device type; None when it can."""
    if _MISSING[backend] is not None:
        return _MISSING[backend]
    devices = _DEVICES.get(backend)
    if devices is not None and device_type not in devices:
        return f"it has no kernels for {device_type} tensors"
    if backend == "native" and device_type == "cuda":
        return _why_not_native_on_cuda(device_index)
    return None


def under_transforms():
    """True while torch.func transforms (grad, vmap, ...) are at work, which see into plain PyTorch
    only."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def resolve(backend, x):
    """The backend that runs a call on tensor `x`: under torch.func transforms `reference`.

    Raises ValueError for an unknown name and RuntimeError, with the reason, for a named backend
    that cannot run here.
    """
    device_type = x.device.type
    if under_transforms():
        if backend not in ("auto", "reference"):
            raise RuntimeError(
                f"backend {backend!r} cannot run under torch.func transforms: reference can"
            )
        return "reference"
    if backend == "auto":
        for name in AUTO.get(device_type, ()):
            if why_not(name, device_type, x.device.index) is None:
                return name
        return "reference"
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}, got {backend!r}")
    reason = why_not(backend, device_type, x.device.index)
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} cannot run: {reason}")
    return backend


def is_differentiable(x):
    """True where autograd is to record what becomes of `x`."""
    return torch.is_grad_enabled() and x.requires_grad


def scalars(*numbers):
    """The numbers of a call, inf for None, as one fp64 tensor on the CPU for launchers to read.

    A Python float among the arguments of a registered op is burnt into a compiled graph, and each
    new value of a temperature or a coefficient would compile another; so would `torch.tensor`.
    """
    numbers = [math.inf if x is None else x for x in numbers]
    if torch.compiler.is_compiling():
        return torch.stack([torch.ones((), dtype=torch.float64, device="cpu") * x for x in numbers])
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")


def denominator_on(device, denominator):
    """A checked denominator as kernels take it: None, or an fp64 tensor on the device.

    A product: a copy to the device would wait, and `torch.tensor` compile anew for each number.
    """
    if denominator is None:
        return None
    return torch.ones((), dtype=torch.float64, device=device) * denominator


def temperatures_and_number(temperature):
    """(tensor of one per token or None, number): what kernels take of a temperature."""
    return (temperature, 1.0) if isinstance(temperature, torch.Tensor) else (None, temperature)


def kernels(backend):
    """The registered ops of a backend: `kernels("native").gae(...)`."""
    return getattr(torch.ops, schemas.NAMESPACE[backend])
