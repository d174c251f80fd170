// The extension module `_C`: importing it registers the kernels (csrc/cpu, csrc/cuda) with torch.
// Written against CPython's limited API, so that one binary serves Python 3.10 and later ones.

#undef Py_LIMITED_API  // torch's build gives another with each version
#define Py_LIMITED_API 0x030a0000
#include <Python.h>

#include "cpu/simd/sweeps.h"

// The GPUs that csrc/cuda was compiled for, if it was: setup.py.
#ifndef PPO_CUDA_ARCHS
#define PPO_CUDA_ARCHS ""
#endif

namespace {

#if defined(__clang__)
constexpr char kCompiler[] = "clang " __clang_version__;
#else
constexpr char kCompiler[] = "gcc " __VERSION__;
#endif
#if defined(__x86_64__)
constexpr char kLevels[] = "avx512_bf16 avx512 avx2 baseline";
#else
constexpr char kLevels[] = "baseline";
#endif

// A new tuple of the words of a text; null and a Python error without memory.
PyObject* words(const char* text) {
  PyObject* string = PyUnicode_FromString(text);
  PyObject* list = string ? PyUnicode_Split(string, nullptr, -1) : nullptr;
  PyObject* tuple = list ? PySequence_Tuple(list) : nullptr;
  Py_XDECREF(list);
  Py_XDECREF(string);
  return tuple;
}

PyObject* build_info(PyObject*, PyObject*) {
  return Py_BuildValue("{s:s, s:N, s:s, s:N, s:s}", "compiler", kCompiler, "simd_compiled",
                       words(kLevels), "simd", ppo::cpu::sweep_table().level, "cuda_archs",
                       words(PPO_CUDA_ARCHS), "torch_target", PPO_TORCH_TARGET);
}

PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS, "Compiler, SIMD levels, CUDA archs and torch target."},
    {}};

PyModuleDef_Slot slots[] = {{}};

PyModuleDef definition{PyModuleDef_HEAD_INIT,
                       "_C",
                       "C++ kernels of ppo_kernels; importing it registers them with torch.",
                       0,
                       methods,
                       slots};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModuleDef_Init(&definition); }
