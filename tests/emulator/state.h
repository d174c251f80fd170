// The threads, blocks and clusters of the kernel that runs: shared by emulator.cpp, which decides
// who runs next, and device.cpp, which says who has to wait for what.
#pragma once

#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "fiber.h"
#include "scheduler.h"

namespace emulator {

struct Block;
struct Cluster;

enum class Wait { none, flag, syncthreads, warp, cluster, copy };

struct Warp {
  // Bits of lanes: that have not exited, that wait in a collective, that wait for the whole block
  // or cluster.
  uint32_t live = 0, in_collective = 0, at_barrier = 0;
};

struct Thread : Fiber {
  uint3 index;
  uint32_t linear;
  Block* block;
  Wait wait;
  Site site;  // of the last wait

  // The collective it waits in, then its result.
  Collective kind;
  uint32_t mask, source;
  uint64_t value;

  bool arrived;    // at the barrier of the cluster, and has not waited since
  bool unfenced;   // reached into the shared memory of its cluster after its last fence
  uint64_t phase;  // of the cluster, when it arrived

  uint32_t lane() const { return linear % 32; }
  Warp& warp() const;
};

struct BulkBarrier {
  const Thread* owner = nullptr;
  bool ready = false, used = false, open = false, waited = false;
  std::vector<Thread*> waiting;
};

struct Free {
  void operator()(char* memory) const { std::free(memory); }
};

struct Block {
  Cluster* cluster;
  uint3 index;
  uint32_t rank;
  std::vector<Thread*> threads;
  std::vector<Warp> warps;
  uint32_t live, at_syncthreads = 0;
  std::unique_ptr<char, Free> memory;
  char* shared;  // in `memory`, between red zones
  std::map<const uint64_t*, BulkBarrier> barriers;
};

struct Cluster {
  std::vector<Block> blocks;
  uint64_t live = 0, arrived = 0, phase = 0;
};

struct Copy {
  Block* block;
  void* to;
  const void* from;
  uint32_t bytes;
  BulkBarrier* barrier;
  uint32_t delay;  // rounds that it takes
  bool lazy;       // they count only when somebody waits
};

inline Warp& Thread::warp() const { return block->warps[linear / 32]; }

extern Launch kernel;
extern Thread* running;  // null while the scheduler runs
extern std::vector<Copy> copies;
extern uint64_t rounds_of_polling;                 // since a thread did what others may poll for
extern std::map<const uint32_t*, uint32_t> flags;  // as they were set, or found at first

// A random number below n.
uint64_t random_below(uint64_t n);

// `running` waits: others run until somebody wakes it.
void wait_for(Wait what, Site at);
void wake(Thread* thread);

void fill_with_nan(Block& block);
void check_red_zones(const Block& block);
void perform(const Copy& copy);
// What follows from the end of a thread.
void thread_exits(Thread* thread);

std::string name(const uint3& index);
std::string name(Site site);

}  // namespace emulator
