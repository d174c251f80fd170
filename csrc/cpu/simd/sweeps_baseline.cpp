#include "sweeps_includes.h"

namespace ppo::cpu {
namespace baseline {
namespace {
#include "simd.h"
#include "sweeps_impl.h"
}  // namespace
}  // namespace baseline

constinit const SweepTable kSweepsBaseline = baseline::sweep_table_of("baseline");

}  // namespace ppo::cpu
