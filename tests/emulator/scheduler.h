// What the device functions in emulator.h and ptx.h ask of the scheduler in emulator.cpp. All but
// `launch` are called by a thread of a kernel that runs.
#pragma once

#include <cstdint>
#include <source_location>
#include <string>

namespace emulator {

// Where a kernel calls a device function. The lanes of a warp must come to a collective or a
// barrier at the same place.
using Site = std::source_location;

enum class Collective { sync, ballot, shuffle };

struct Dimensions {
  uint32_t x, y, z;
  uint64_t count() const { return uint64_t(x) * y * z; }
};

struct Launch {
  Dimensions grid, block, cluster;
  size_t shared_bytes;
  void (*run)(const void* arguments);  // one thread
  const void* arguments;
};

// Runs a kernel to its end. Throws std::runtime_error for what the kernel does wrong.
void launch(const Launch& kernel);

[[noreturn]] void fail(const std::string& message, Site at);
// A memory access that a GPU does not do.
void misaligned(const char* file, uint32_t line);
uint32_t lane();
char* shared_memory();

// Before a flag is read: other threads run, for one of them may have to set it.
void yield(Site at);
// Other threads run now and then.
void maybe_yield(Site at);
// Somebody who polls may see something new.
void flag_changed();

void sync_threads(Site at);
// What each lane named in `mask` gets: the value of lane `source`, or for a ballot one bit of each.
uint64_t exchange(Collective kind, uint32_t mask, uint64_t value, uint32_t source, Site at);

uint32_t cluster_rank(Site at);
void cluster_arrive(Site at);
void cluster_wait(Site at);
void fence_cluster(Site at);
const void* in_cluster(const void* p, uint32_t rank, Site at);

void barrier_init(uint64_t* barrier, Site at);
void barriers_ready(Site at);
void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* barrier, Site at);
void barrier_wait(uint64_t* barrier, Site at);

// Of the emulated device, and of the PTX that its code was compiled from (90 for sm_90).
extern int device_major, ptx_version;
// Starts the random order anew.
void seed(uint64_t value);
extern uint64_t switches, bulk_copies;
extern uintptr_t bulk_begin, bulk_end;  // of all that bulk copies read

}  // namespace emulator
