"""Scripts for a machine with a GPU that is lent for minutes, each with a limit of its own.

    python3 -m benchmarks.gpu.smoke      all ops checked and timed on both backends      150 s
    python3 -m benchmarks.gpu.sweep      variants of a kernel, built before, in turns     60 s
    python3 -m benchmarks.gpu.profile    one kernel of one op under Nsight Compute        60 s
    python3 -m benchmarks.gpu.tests      the tests that need a GPU                       240 s
    python3 -m benchmarks.gpu.bench      pytest-benchmark against baselines              240 s
    python3 -m benchmarks.gpu            all there is to build, test and measure         600 s

The CUDA C++ kernels are those of ppo_kernels/_C.abi3.so. `make gpu-wheel` builds it on a machine
with nvcc and leaves it in the tree, to be carried with it; it serves every Python from 3.10 and
every torch from 2.11 on, and needs glibc 2.28. Nothing is built where it is carried to.

Results go to the folder `--out`, by default that of the environment variable OUT, line by line:
what was found before a limit was reached is kept. `--rehearse` runs every line on a CPU.
"""
