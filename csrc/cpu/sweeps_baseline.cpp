#include "sweeps_includes.h"

namespace ppo::cpu {
namespace baseline {
namespace {
#include "simd.h"
#include "sweeps_impl.h"
}  // namespace
}  // namespace baseline

extern const SweepTable kSweepsBaseline = {baseline::sweeps_of<float>(), baseline::sweeps_of<double>(),
    baseline::sweeps_of<BFloat16>(), baseline::sweeps_of<Half>(), "baseline"};

}  // namespace ppo::cpu
