"""`python -m ppo_kernels`: versions, backends, and why one is missing."""

import importlib.metadata
import platform

import torch

from ppo_kernels import __version__, dispatch

VOCABULARIES = (32_000, 50_257, 128_256, 151_936)


def _triton_version():
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def divisions(device):
    """Lines: how the native kernels divide a row of logits over a GPU."""
    lines = []
    for dtype in (torch.bfloat16, torch.float32):
        for vocabulary in VOCABULARIES:
            logits = torch.empty(0, vocabulary, dtype=dtype, device=device)
            division = dispatch.kernels("native").row_division(logits)
            ctas, threads, shared, kept, resident, clusters = division
            place = f"kept in {shared:,} bytes each" if kept else "read twice"
            of_device = f", {clusters} rows on the device" if ctas > 1 else ""
            lines.append(
                f"rows        V = {vocabulary:,} {str(dtype).removeprefix('torch.')}: "
                f"{ctas} CTA{'s' * (ctas > 1)} of {threads} threads, {place}; "
                f"{resident} to a multiprocessor{of_device}"
            )
    return lines


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
    if gpu and dispatch.why_not("native", "cuda") is None:
        lines += divisions("cuda")
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
