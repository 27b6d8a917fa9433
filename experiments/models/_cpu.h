// What all functions for CPU share: vectors, memory, and the threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;  // floats of a vector register; there are 32 registers
#elif defined(__AVX__)
constexpr int kLanes = 8;  // 16 registers
#else
constexpr int kLanes = 4;
#endif
typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

// Memory for `count` floats, in whole cache lines, until the next call on the same thread for the same
// `kUse`. It is kept, since pages that are fresh every time cost more than what is written to them.
template <int kUse = 0>
float* scratch(int64_t count) {
  constexpr int64_t kLine = 64;
  thread_local std::unique_ptr<float, decltype(&std::free)> kept(nullptr, &std::free);
  thread_local int64_t size = 0;
  if (count > size) {
    size = (count * sizeof(float) + kLine - 1) / kLine * kLine;
    kept.reset(static_cast<float*>(std::aligned_alloc(kLine, size)));
    size /= sizeof(float);
  }
  return kept.get();
}

// Runs work(0), ..., work(count - 1) on the threads of the pool. The caller takes part and waits
// only for what others have begun, so that it makes no difference how busy they are.
template <typename Work>
void in_parallel(ffi::ThreadPool& pool, int64_t count, const Work& work) {
  struct Shared {
    std::atomic<int64_t> next{0};
    int64_t done = 0;
    std::mutex mutex;
    std::condition_variable changed;
  };
  auto shared = std::make_shared<Shared>();
  // `work` is alive as long as an index is left: the caller returns after the last is done.
  auto take = [shared, count, &work] {
    for (int64_t i; (i = shared->next.fetch_add(1)) < count;) {
      work(i);
      std::lock_guard<std::mutex> lock(shared->mutex);
      if (++shared->done == count) shared->changed.notify_all();
    }
  };
  const int64_t helpers = std::min(count, pool.num_threads()) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(decltype(take)(take));
  take();
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->changed.wait(lock, [&] { return shared->done == count; });
}

Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }

void store(float* to, Vector values, int64_t lanes) {
  std::memcpy(to, &values, sizeof(float) * std::min<int64_t>(lanes, kLanes));
}

}  // namespace
