"""`python -m ppo_kernels`: versions, backends, and why one is missing."""

import importlib.metadata
import platform

import torch

from ppo_kernels import __version__, dispatch


def _triton_version():
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def report():
    lines = [
        f"ppo_kernels {__version__}",
        f"torch       {torch.__version__}",
        f"triton      {_triton_version()}",
        f"python      {platform.python_version()} on {platform.machine()}",
        f"threads     {torch.get_num_threads()}",
    ]
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for backend in dispatch.BACKENDS:
        for device in devices:
            reason = dispatch.why_not(backend, device)
            state = "available" if reason is None else f"missing: {reason}"
            lines.append(f"{backend:<11} {device}: {state}")
    for device in devices:
        chosen = dispatch.resolve("auto", torch.empty(0, device=device))
        lines.append(f"{'auto':<11} {device}: {chosen}")
    info = dispatch.build_info()
    if info is not None:
        lines += [
            f"SIMD        {info['simd']} (compiled: {', '.join(info['simd_compiled'])}; "
            "PPO_KERNELS_SIMD in the environment asks for less)",
            f"CUDA archs  {', '.join(info['cuda_archs']) or 'none compiled'}",
            f"compiler    {info['compiler']}, stable ABI of torch {info['torch_target']}",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
