"""One kernel of one op under Nsight Compute.

    python3 -m benchmarks.gpu.profile --op ppo_loss_ --tokens 2048 --vocabulary 151936 --out DIR

The third call is profiled, at the clocks that the card has: `<op>-<backend>.ncu-rep`, which
`ncu --import` prints, and what it says as text beside it. In a rehearsal the op is called and
nothing is profiled.
"""

import shutil
import subprocess
import sys

import torch

from benchmarks.gpu import common
from benchmarks.gpu.families import MAKERS

CALLS = 3
# The kernel of an op that does its work, where a call launches several: of native and of Triton.
KERNELS = {
    "ppo_loss_": ("with_gradient", "_ppo_loss"),
    "ppo_loss": ("with_gradient", "_ppo_loss"),
    "token_logprobs_and_entropy": ("forward", "_forward"),
    "kl_divergence": ("forward", "_forward"),
    "gae": ("scan", "_advantages"),
    "sample_tokens": ("unfiltered", "_unfiltered"),
    "token_statistics": ("forward", "_forward"),
}


def call(args) -> None:
    setting = common.setting(args.backend, args.rehearse)
    torch.set_default_device(setting.device)
    shape = (args.tokens, args.vocabulary)
    contest = MAKERS[args.op](shape, getattr(torch, args.dtype), setting)
    for _ in range(CALLS):
        contest.reset()
        contest.op()
    if setting.device.type == "cuda":
        torch.cuda.synchronize()


def main() -> int:
    parser = common.parser(__doc__.splitlines()[0], seconds=60)
    parser.add_argument("--op", choices=sorted(MAKERS), required=True)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--backend", choices=common.BACKENDS, default="native")
    parser.add_argument("--kernel", help="ncu's filter of kernel names")
    parser.add_argument("--call", action="store_true", help="call the op and profile nothing")
    args = common.parse(parser)
    if args.call or args.rehearse:
        call(args)
        return 0
    ncu = shutil.which("ncu")
    if ncu is None:
        print("there is no ncu: nothing is profiled")
        return 1
    target = args.out.resolve() / f"{args.op}-{args.backend}"
    kernel = args.kernel or KERNELS[args.op][common.BACKENDS.index(args.backend)]
    profiler = (
        *(ncu, "--clock-control", "none", "--set", "full", "--force-overwrite"),
        *("--kernel-name", kernel),
        *("--launch-skip", str(CALLS - 1), "--launch-count", "1", "--export", str(target)),
    )
    code = common.run(
        *("-m", "benchmarks.gpu.profile", "--call", "--out", str(args.out.resolve())),
        *("--op", args.op, "--tokens", str(args.tokens), "--vocabulary", str(args.vocabulary)),
        *("--dtype", args.dtype, "--backend", args.backend),
        seconds=args.seconds,
        under=profiler,
    )
    if code == 0:
        text = subprocess.run(
            [ncu, "--import", f"{target}.ncu-rep", "--page", "details"],
            capture_output=True,
            text=True,
        ).stdout
        target.with_suffix(".txt").write_text(text)
        print(text)
    return code


if __name__ == "__main__":
    sys.exit(main())
