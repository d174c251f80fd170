// Runs the threads of a kernel, each a fiber, on one host thread in a random order: whatever CUDA
// leaves open comes in every order, and what needs a barrier that is not there goes wrong.
//
// A thread runs until it waits or yields. In every round those that can run do, in an order that
// the round chooses; some rounds leave one thread, warp or block far behind the others or let it
// run far ahead. A few clusters, a number that the launch chooses, are resident at once, and
// another one starts when one of them has ended: as on a GPU, a block must not wait for one that
// starts later.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string_view>
#include <utility>

#include "state.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {

Launch kernel;
Thread* running = nullptr;
std::vector<Copy> copies;
uint64_t rounds_of_polling = 0;
uint64_t switches = 0, left_out = 0;
std::map<const uint32_t*, uint32_t> flags;

namespace {

constexpr uint64_t kMostResident = 4;            // clusters
constexpr uint64_t kMostResidentThreads = 8192;  // unless one cluster has more
constexpr size_t kRedZone = 4096;                // a multiple of 128
constexpr char kNaN = char(0xff);
// Longer than any kernel of the tests works between two flags that it sets.
constexpr uint64_t kMostRoundsOfPolling = 20000;

std::vector<std::unique_ptr<Cluster>> resident;
std::vector<Thread*> runnable;
std::vector<Thread*> idle_fibers;
std::string error;
bool polling;         // in this round
bool barrier_opened;  // since the round before
uint64_t random_state = 1;

struct {
  std::string file;
  uint32_t line = 0;
} out;  // what is left out

struct Pace {
  const void* of = nullptr;  // the thread, warp or block that is
  bool ahead;                // of the others, or behind them
  uint64_t rounds = 0;       // for so many rounds still
} pace;

bool concerns(const Thread* thread) {
  return pace.of == thread || pace.of == &thread->warp() || pace.of == thread->block;
}

bool all_nan(const char* begin, const char* end) {
  if (begin == end) return true;
  return *begin == kNaN && std::memcmp(begin, begin + 1, size_t(end - begin) - 1) == 0;
}

Dimensions at(uint64_t linear, const Dimensions& size) {
  return {uint32_t(linear % size.x), uint32_t(linear / size.x % size.y),
          uint32_t(linear / size.x / size.y)};
}

Thread* idle_fiber() {
  if (idle_fibers.empty()) return new Thread;
  Thread* thread = idle_fibers.back();
  idle_fibers.pop_back();
  return thread;
}

void start_block(Cluster& cluster, uint32_t rank, Dimensions first) {
  Block& block = cluster.blocks[rank];
  const Dimensions in_cluster = at(rank, kernel.cluster);
  block.cluster = &cluster;
  block.rank = rank;
  block.index = {first.x + in_cluster.x, first.y + in_cluster.y, first.z + in_cluster.z};
  const size_t bytes = (kernel.shared_bytes + 127) / 128 * 128 + 2 * kRedZone;
  block.memory.reset(static_cast<char*>(std::aligned_alloc(128, bytes)));
  block.shared = block.memory.get() + kRedZone;
  std::memset(block.memory.get(), kNaN, bytes);
  block.live = uint32_t(kernel.block.count());
  block.warps.resize((block.live + 31) / 32);
  for (uint32_t i = 0; i < block.live; ++i) {
    Thread* thread = idle_fiber();
    const Dimensions index = at(i, kernel.block);
    thread->index = {index.x, index.y, index.z};
    thread->linear = i;
    thread->block = &block;
    thread->wait = Wait::none;
    thread->site = Site{};
    thread->arrived = thread->unfenced = false;
    thread->warp().live |= 1u << thread->lane();
    block.threads.push_back(thread);
    runnable.push_back(thread);
  }
}

void start_cluster(uint64_t linear) {
  const auto& [grid, size] = std::pair(kernel.grid, kernel.cluster);
  const Dimensions in_grid = at(linear, {grid.x / size.x, grid.y / size.y, grid.z / size.z});
  Cluster& cluster = *resident.emplace_back(std::make_unique<Cluster>());
  cluster.blocks.resize(size.count());
  cluster.live = size.count() * kernel.block.count();
  for (uint32_t rank = 0; rank < size.count(); ++rank) {
    start_block(cluster, rank, {in_grid.x * size.x, in_grid.y * size.y, in_grid.z * size.z});
  }
  rounds_of_polling = 0;
}

void end_cluster(Cluster& cluster) {
  pace.rounds = 0;  // `pace.of` may be gone
  for (Block& block : cluster.blocks) {
    if (!all_nan(block.shared, block.shared + kernel.shared_bytes)) {
      error = "shared memory of block " + name(block.index) + " was written after its end";
    }
    idle_fibers.insert(idle_fibers.end(), block.threads.rbegin(), block.threads.rend());
  }
}

// Every fiber begins anew.
void abandon() {
  for (const auto& cluster : resident) {
    for (Block& block : cluster->blocks) {
      for (Thread* thread : block.threads) thread->begun = false;
      idle_fibers.insert(idle_fibers.end(), block.threads.begin(), block.threads.end());
    }
  }
  resident.clear();
  runnable.clear();
  copies.clear();
  flags.clear();
}

void resume(Thread* thread) {
  ++switches;
  running = thread;
  threadIdx = thread->index;
  blockIdx = thread->block->index;
  enter(*thread);
  running = nullptr;
}

// Puts the threads that are to run now into `round`, in the order in which they are to run.
void begin_round(std::vector<Thread*>& round) {
  round.swap(runnable);
  // What races without a barrier does so right after the one before.
  if (barrier_opened ? random_below(2) == 0 : pace.rounds == 0 && random_below(8) == 0) {
    const Thread* thread = round[random_below(round.size())];
    const void* choices[] = {thread, &thread->warp(), thread->block};
    pace = {choices[random_below(3)], random_below(2) == 0, 1 + random_below(32)};
  }
  barrier_opened = false;
  if (pace.rounds > 0) {
    --pace.rounds;
    const auto now = [](const Thread* thread) { return concerns(thread) == pace.ahead; };
    const auto later = std::stable_partition(round.begin(), round.end(), now);
    if (later == round.begin()) {
      pace.rounds = 0;
    } else {
      runnable.assign(later, round.end());
      round.erase(later, round.end());
    }
  }
  const auto before = [](const Thread* a, const Thread* b) {
    return std::pair(a->block->rank, a->linear) < std::pair(b->block->rank, b->linear);
  };
  switch (random_below(8)) {
    case 0:
      std::sort(round.begin(), round.end(), before);
      break;
    case 1:
      std::sort(round.rbegin(), round.rend(), before);
      break;
    default:
      for (size_t i = round.size(); i > 1; --i) std::swap(round[i - 1], round[random_below(i)]);
  }
}

// Performs the copies that are due and, where nothing else can go on, one that is not.
void perform_copies(bool stuck) {
  const size_t forced = stuck && !copies.empty() ? random_below(copies.size()) : copies.size();
  size_t kept = 0;
  for (size_t i = 0; i < copies.size(); ++i) {
    Copy& copy = copies[i];
    const bool counts = !copy.lazy || !copy.barrier->waiting.empty();
    if (i == forced || (counts && copy.delay == 0)) {
      perform(copy);
      continue;
    }
    copy.delay -= counts;
    copies[kept++] = copy;
  }
  copies.resize(kept);
}

std::string deadlock(uint64_t not_started) {
  const char* names[] = {"run",
                         "poll a flag",
                         "wait at __syncthreads",
                         "wait for their warp",
                         "wait for their cluster",
                         "wait for a bulk copy"};
  std::string message = "deadlock:";
  for (const auto& cluster : resident) {
    for (const Block& block : cluster->blocks) {
      std::map<std::string, std::vector<const Thread*>> groups;
      for (const Thread* thread : block.threads) {
        if (!(thread->warp().live >> thread->lane() & 1)) continue;
        groups[names[int(thread->wait)] + (" at " + name(thread->site))].push_back(thread);
      }
      for (const auto& [what, threads] : groups) {
        message += " in block " + name(block.index) + " " + std::to_string(threads.size()) +
                   " threads from " + name(threads.front()->index) + " on " + what + ";";
      }
    }
  }
  return message + " " + std::to_string(not_started) + " clusters have not started";
}

void run_to_the_end() {
  std::vector<uint64_t> waiting(kernel.grid.count() / kernel.cluster.count());
  for (uint64_t i = 0; i < waiting.size(); ++i) {
    waiting[i] = i;
    std::swap(waiting[i], waiting[random_below(i + 1)]);
  }
  const uint64_t fit = kMostResidentThreads / (kernel.cluster.count() * kernel.block.count());
  const uint64_t most = 1 + random_below(std::clamp(fit, uint64_t(1), kMostResident));
  std::vector<Thread*> round;
  for (;;) {
    std::erase_if(resident, [](const auto& cluster) {
      if (cluster->live > 0) return false;
      end_cluster(*cluster);
      return true;
    });
    if (!error.empty() || (resident.empty() && waiting.empty())) return;
    if (!waiting.empty() && resident.size() < most && (runnable.empty() || random_below(8) == 0)) {
      start_cluster(waiting.back());
      waiting.pop_back();
    }
    const bool can_go_on = !runnable.empty() || !copies.empty();
    if (!can_go_on || rounds_of_polling > kMostRoundsOfPolling) {
      error = deadlock(waiting.size());
      return;
    }
    perform_copies(runnable.empty());
    if (runnable.empty()) continue;
    begin_round(round);
    polling = false;
    for (Thread* thread : round) {
      resume(thread);
      if (!error.empty()) return;
    }
    round.clear();
    rounds_of_polling += polling;
  }
}

}  // namespace

void fiber_main() {
  for (;;) {
    kernel.run(kernel.arguments);
    thread_exits(running);
    leave(*running);
  }
}

void launch(const Launch& launched) {
  kernel = launched;
  gridDim = {kernel.grid.x, kernel.grid.y, kernel.grid.z};
  blockDim = {kernel.block.x, kernel.block.y, kernel.block.z};
  rounds_of_polling = 0;
  barrier_opened = false;
  pace.rounds = 0;
  run_to_the_end();
  abandon();
  if (!error.empty()) throw std::runtime_error(std::exchange(error, {}));
}

void fail(const std::string& message, Site at) {
  error = message + "; block " + name(running->block->index) + ", thread " + name(running->index) +
          ", at " + name(at);
  leave(*running);
  std::abort();  // nobody resumes it
}

void misaligned(const char* file, uint32_t line) {
  if (!running) return;  // the host's own affair
  fail("misaligned address in " + std::string(file) + ":" + std::to_string(line), running->site);
}

void wait_for(Wait what, Site at) {
  running->wait = what;
  running->site = at;
  leave(*running);
}

void wake(Thread* thread) {
  barrier_opened |= thread->wait == Wait::syncthreads || thread->wait == Wait::cluster;
  thread->wait = Wait::none;
  runnable.push_back(thread);
}

void yield(Site at) {
  polling = true;
  runnable.push_back(running);
  wait_for(Wait::flag, at);
  running->wait = Wait::none;
}

void maybe_yield(Site at) {
  if (random_below(2) == 0) return;
  runnable.push_back(running);
  wait_for(Wait::none, at);
}

void flag_changed() { rounds_of_polling = 0; }

void fill_with_nan(Block& block) { std::memset(block.shared, kNaN, kernel.shared_bytes); }

void check_red_zones(const Block& block) {
  const char* end = block.shared + (kernel.shared_bytes + 127) / 128 * 128 + kRedZone;
  if (!all_nan(block.memory.get(), block.shared) ||
      !all_nan(block.shared + kernel.shared_bytes, end)) {
    fail("the block has written beyond its " + std::to_string(kernel.shared_bytes) +
             " bytes of shared memory",
         running->site);
  }
}

uint64_t random_below(uint64_t n) {  // splitmix64
  uint64_t z = random_state += 0x9e3779b97f4a7c15;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return uint64_t(static_cast<unsigned __int128>(z ^ z >> 31) * n >> 64);
}

void seed(uint64_t value) { random_state = value; }

void leave_out(const std::string& file, uint32_t line) {
  out = {file, line};
  left_out = 0;
}

bool is_left_out(Site at) {
  if (at.line() != out.line || !std::string_view(at.file_name()).ends_with(out.file)) return false;
  ++left_out;
  return true;
}

std::string name(const uint3& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
         std::to_string(index.z) + ")";
}

std::string name(Site site) {
  if (site.line() == 0) return "its beginning";
  return std::string(site.file_name()) + ":" + std::to_string(site.line()) + " (" +
         site.function_name() + ")";
}

}  // namespace emulator
