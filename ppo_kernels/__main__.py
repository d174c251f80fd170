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
    info = dispatch.build_info()
    gpu = torch.cuda.is_available()
    cuda = gpu or torch.version.cuda is not None or bool(info and info["cuda_archs"])
    for backend in dispatch.BACKENDS:
        for device in ["cpu", "cuda"] if cuda else ["cpu"]:
            reason = dispatch.why_not(backend, device)
            if reason is None and device == "cuda" and not gpu:
                reason = "PyTorch finds no GPU"
            state = "available" if reason is None else f"missing: {reason}"
            lines.append(f"{backend:<11} {device}: {state}")
    for device in ["cpu", "cuda"] if gpu else ["cpu"]:
        chosen = dispatch.resolve("auto", torch.empty(0, device=device))
        lines.append(f"{'auto':<11} {device}: {chosen}")
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
