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
// A flag is set with `release` by all who set it, and read with `acquire`: a plain store might
// overtake those before it.
void release(uint32_t* flag, uint32_t value, Site at);
uint32_t acquire(const uint32_t* flag, Site at);

void sync_threads(Site at);
// What each lane named in `mask` gets: the value of lane `source`, or for a ballot one bit of each.
uint64_t exchange(Collective kind, uint32_t mask, uint64_t value, uint32_t source, Site at);

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
// What is called at this place, of what synchronises, does nothing from now on; the place is one
// of no file for nowhere. How often it did nothing is counted in `left_out`.
void leave_out(const std::string& file, uint32_t line);
bool is_left_out(Site at);
extern uint64_t left_out;
extern uint64_t switches, bulk_copies;
extern uintptr_t bulk_begin, bulk_end;  // of all that bulk copies read

}  // namespace emulator
