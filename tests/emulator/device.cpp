// What a thread of a kernel may call: who has to wait for whom, and what CUDA forbids.
#include <algorithm>
#include <cstring>

#include "state.h"

namespace emulator {

uint64_t bulk_copies = 0;
uintptr_t bulk_begin = UINTPTR_MAX, bulk_end = 0;

namespace {

// A part of the shared memory of the running thread's block.
bool in_shared(const void* p, size_t bytes) {
  const char* shared = running->block->shared;
  const char* begin = static_cast<const char*>(p);
  return begin >= shared && begin + bytes <= shared + kernel.shared_bytes;
}

uintptr_t address(const void* p) { return reinterpret_cast<uintptr_t>(p); }

void need_sm90(Site at) {
  if (ptx_version < 90) fail("needs code for compute capability 9.0", at);
}

// A lane that a collective of this warp names will not come to it.
void check_not_awaited(const Thread* thread, const char* instead, Site at) {
  const Warp& warp = thread->warp();
  if (warp.in_collective == 0) return;
  const uint32_t first = thread->linear / 32 * 32;
  for (uint32_t i = first; i < std::min(first + 32, uint32_t(thread->block->threads.size())); ++i) {
    const Thread* other = thread->block->threads[i];
    if (other->wait == Wait::warp && other->mask >> thread->lane() & 1) {
      fail("divergent warp: thread " + name(other->index) + " waits for this lane at " +
               name(other->site) + ", but it " + instead,
           at);
    }
  }
}

void release_syncthreads(Block& block) {
  if (block.live == 0 || block.at_syncthreads < block.live) return;
  block.at_syncthreads = 0;
  const Thread* first = nullptr;  // of the warp
  for (Thread* thread : block.threads) {
    if (thread->lane() == 0) first = nullptr;
    if (thread->wait != Wait::syncthreads) continue;
    if (first && (first->site.line() != thread->site.line() ||
                  first->site.column() != thread->site.column())) {
      fail("divergent warp: thread " + name(first->index) + " waits at __syncthreads at " +
               name(first->site) + ", thread " + name(thread->index) + " at another one",
           thread->site);
    }
    if (!first) first = thread;
    thread->warp().at_barrier &= ~(1u << thread->lane());
    wake(thread);
  }
}

void release_cluster(Cluster& cluster) {
  if (cluster.live == 0 || cluster.arrived < cluster.live) return;
  cluster.arrived = 0;
  ++cluster.phase;
  for (Block& block : cluster.blocks) {
    for (Thread* thread : block.threads) {
      if (thread->wait != Wait::cluster) continue;
      thread->warp().at_barrier &= ~(1u << thread->lane());
      wake(thread);
    }
  }
}

BulkBarrier& find(const uint64_t* barrier, Site at) {
  const auto found = running->block->barriers.find(barrier);
  if (found == running->block->barriers.end()) fail("use of an uninitialised barrier", at);
  if (*barrier != address(barrier)) fail("the barrier was overwritten", at);
  return found->second;
}

// Whether all lanes that the running thread names are in the same collective; then they all have
// its result.
bool complete(Warp& warp) {
  const uint32_t mask = running->mask;
  if ((warp.in_collective & mask) != mask) return false;
  Thread* const* lanes = &running->block->threads[running->linear / 32 * 32];
  uint64_t values[32], votes = 0;
  for (uint32_t i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    const Thread& other = *lanes[i];
    const bool same = other.kind == running->kind && other.mask == mask &&
                      other.site.line() == running->site.line() &&
                      other.site.column() == running->site.column();
    if (!same && other.mask >> running->lane() & 1) {
      fail("divergent warp: thread " + name(other.index) + " is in another collective, at " +
               name(other.site),
           running->site);
    }
    if (!same) return false;
    values[i] = other.value;
    votes |= uint64_t(other.value != 0) << i;
  }
  for (uint32_t i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    lanes[i]->value = running->kind == Collective::ballot ? votes : values[lanes[i]->source];
  }
  return true;
}

}  // namespace

uint32_t lane() { return running->lane(); }

char* shared_memory() { return running->block->shared; }

void release(uint32_t* flag, uint32_t value, Site at) {
  *flag = value;
  flag_changed();
  if (!is_left_out(at)) flags[flag] = value;
}

uint32_t acquire(const uint32_t* flag, Site at) {
  const auto [known, fresh] = flags.try_emplace(flag, *flag);
  if (known->second != *flag) fail("the flag was not set by store_release", at);
  return *flag;
}

void sync_threads(Site at) {
  if (is_left_out(at)) return;
  check_not_awaited(running, "comes to __syncthreads", at);
  running->warp().at_barrier |= 1u << running->lane();
  running->wait = Wait::syncthreads;
  running->site = at;
  ++running->block->at_syncthreads;
  release_syncthreads(*running->block);
  leave(*running);
}

uint64_t exchange(Collective kind, uint32_t mask, uint64_t value, uint32_t source, Site at) {
  if (is_left_out(at)) return value;
  Warp& warp = running->warp();
  const uint32_t me = 1u << running->lane();
  if (!(mask & me)) fail("the mask of a collective does not name the caller", at);
  if (!(mask >> source & 1)) fail("shuffle from a lane that the mask does not name", at);
  if (mask & ~warp.live) fail("the mask of a collective names lanes that have exited", at);
  if (mask & warp.at_barrier)
    fail("divergent warp: a lane that the mask names is at a barrier", at);
  running->kind = kind;
  running->mask = mask;
  running->value = value;
  running->source = source;
  running->wait = Wait::warp;
  running->site = at;
  warp.in_collective |= me;
  if (complete(warp)) {
    warp.in_collective &= ~mask;
    Thread* const* lanes = &running->block->threads[running->linear / 32 * 32];
    for (uint32_t i = 0; i < 32; ++i) {
      if (mask >> i & 1) wake(lanes[i]);
    }
  }
  leave(*running);
  return running->value;
}

void cluster_arrive(Site at) {
  if (is_left_out(at)) return;
  need_sm90(at);
  if (running->arrived) fail("cluster_arrive again without cluster_wait", at);
  if (running->unfenced) fail("cluster_arrive after in_cluster without fence_cluster", at);
  Cluster& cluster = *running->block->cluster;
  running->arrived = true;
  running->phase = cluster.phase;
  ++cluster.arrived;
  release_cluster(cluster);
  maybe_yield(at);
}

void cluster_wait(Site at) {
  if (is_left_out(at)) return;
  need_sm90(at);
  if (!running->arrived) fail("cluster_wait without cluster_arrive", at);
  running->arrived = false;
  // Lanes that saw the barrier open may already wait for this one in a collective behind it.
  if (running->block->cluster->phase > running->phase) return maybe_yield(at);
  check_not_awaited(running, "comes to cluster_wait", at);
  running->warp().at_barrier |= 1u << running->lane();
  wait_for(Wait::cluster, at);
}

void fence_cluster(Site at) {
  if (is_left_out(at)) return;
  need_sm90(at);
  running->unfenced = false;
}

const void* in_cluster(const void* p, uint32_t rank, Site at) {
  need_sm90(at);
  Cluster& cluster = *running->block->cluster;
  if (rank >= cluster.blocks.size()) fail("in_cluster: there is no such rank", at);
  if (!in_shared(p, 1)) fail("in_cluster: not in the shared memory of this block", at);
  const Block& peer = cluster.blocks[rank];
  if (&peer != running->block && cluster.phase == 0) {
    fail("in_cluster: the other block may not have started, no cluster barrier was passed", at);
  }
  if (peer.live == 0) fail("in_cluster: the other block has exited", at);
  running->unfenced = true;  // it may be to write there
  return peer.shared + (static_cast<const char*>(p) - running->block->shared);
}

void barrier_init(uint64_t* barrier, Site at) {
  if (is_left_out(at)) return;
  need_sm90(at);
  if (!in_shared(barrier, sizeof *barrier)) fail("the barrier is not in shared memory", at);
  if (address(barrier) % 8 != 0) fail("misaligned barrier", at);
  const auto [entry, fresh] = running->block->barriers.try_emplace(barrier);
  if (!fresh) fail("the barrier is initialised twice", at);
  entry->second.owner = running;
  *barrier = address(barrier);
}

void barriers_ready(Site at) {
  if (is_left_out(at)) return;
  need_sm90(at);
  for (auto& [place, barrier] : running->block->barriers) barrier.ready |= barrier.owner == running;
}

void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* place, Site at) {
  need_sm90(at);
  BulkBarrier& barrier = find(place, at);
  if (!barrier.ready) fail("bulk_copy before barriers_ready", at);
  if (barrier.used) fail("the barrier is used twice", at);
  if (address(shared) % 16 != 0 || address(global) % 16 != 0) fail("misaligned bulk_copy", at);
  if (bytes % 16 != 0) fail("bulk_copy of a number of bytes that is no multiple of 16", at);
  if (bytes >= 1 << 20) fail("bulk_copy of more bytes than a barrier counts", at);
  if (!in_shared(shared, bytes)) fail("bulk_copy beyond shared memory", at);
  barrier.used = true;
  ++bulk_copies;
  bulk_begin = std::min(bulk_begin, address(global));
  bulk_end = std::max(bulk_end, address(global) + bytes);
  const bool lazy = random_below(2) == 0;
  const uint32_t delay = uint32_t(random_below(16));
  copies.push_back({running->block, shared, global, bytes, &barrier, delay, lazy});
  maybe_yield(at);
}

void barrier_wait(uint64_t* place, Site at) {
  if (is_left_out(at)) return;
  need_sm90(at);
  BulkBarrier& barrier = find(place, at);
  barrier.waited = true;
  if (barrier.open) return maybe_yield(at);
  barrier.waiting.push_back(running);
  wait_for(Wait::copy, at);
}

void perform(const Copy& copy) {
  std::memcpy(copy.to, copy.from, copy.bytes);
  copy.barrier->open = true;
  for (Thread* thread : copy.barrier->waiting) wake(thread);
}

void thread_exits(Thread* thread) {
  check_not_awaited(thread, "exits", thread->site);
  Block& block = *thread->block;
  Cluster& cluster = *block.cluster;
  flag_changed();
  thread->warp().live &= ~(1u << thread->lane());
  --block.live;
  --cluster.live;
  if (thread->arrived) --cluster.arrived;
  release_syncthreads(block);
  release_cluster(cluster);
  if (block.live > 0) return;
  for (const auto& [place, barrier] : block.barriers) {
    if (barrier.used && !barrier.waited) {
      fail("the block ends, but nobody has waited for its bulk copy", thread->site);
    }
  }
  check_red_zones(block);
  fill_with_nan(block);
}

}  // namespace emulator
