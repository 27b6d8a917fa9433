// What the convolution of `_conv_cpu.cc` and its transposes share: which pixels meet which taps, and
// sums over taps at pixels.

#pragma once

#include "_cpu.h"

#include <map>
#include <utility>
#include <vector>

namespace {

// Pixels (or taps) of a register tile: with two vectors of channels each, they leave registers for
// the factors.
#if defined(__AVX__) && !defined(__AVX512F__)
constexpr int kTile = 6, kRowsOfOne = 12, kRowsOfTwo = 6;
#else
constexpr int kTile = 8, kRowsOfOne = 16, kRowsOfTwo = 12;
#endif
constexpr int64_t kCache = 1 << 20;  // bytes of images that are worked on at a time
constexpr int64_t kTasks = 4;        // of a thread, at least, where there are enough
constexpr int64_t kPixels = 256;     // pixels that are, for the gradient of a kernel
constexpr int64_t kListed = 64;      // of which at least this many are listed at a time
constexpr int64_t kFewChannels = 8;  // fewer do not fill a tile of the kernel's gradient

// What one output row (or column) reads: `count` inputs from `first` on, by the taps from `tap` on,
// in the order in which the taps are packed.
struct Reach {
  int64_t first, count, tap;
};

// One axis of a convolution: inputs, outputs, taps, stride; the padding is half of the taps.
struct Axis {
  int64_t in, out, taps, stride;

  std::vector<Reach> forward() const {
    std::vector<Reach> reaches;
    for (int64_t p = 0; p < out; ++p) {
      const int64_t start = p * stride - taps / 2;
      const int64_t first = std::max<int64_t>(0, start), last = std::min(in, start + taps);
      reaches.push_back({first, std::max<int64_t>(0, last - first), first - start});
    }
    return reaches;
  }

  // The other way: which outputs an input has a part in. Later outputs have earlier taps, and only
  // every stride-th tap; `order` packs them so that the taps of a reach lie one after another.
  std::vector<int64_t> order() const {
    std::vector<int64_t> order;
    for (int64_t rest = 0; rest < stride; ++rest)
      for (int64_t tap = taps - 1; tap >= 0; --tap)
        if (tap % stride == rest) order.push_back(tap);
    return order;
  }

  std::vector<Reach> backward() const {
    const std::vector<int64_t> packed = order();
    std::vector<Reach> reaches;
    for (int64_t y = 0; y < in; ++y) {
      Reach reach{0, 0, 0};
      for (int64_t p = 0; p < out; ++p) {
        const int64_t tap = y + taps / 2 - p * stride;
        if (tap < 0 || tap >= taps) continue;
        if (reach.count++ == 0) {
          reach.first = p;
          reach.tap = std::find(packed.begin(), packed.end(), tap) - packed.begin();
        }
      }
      reaches.push_back(reach);
    }
    return reaches;
  }
};

// Pixels that meet the same taps, and where they read and write, counted in floats.
struct Class {
  Reach rows, columns;
  std::vector<int64_t> reads, writes;
};

// The classes of a number of images; `width`, `channels` are those of what is read.
std::vector<Class> classes(int64_t images, const std::vector<Reach>& rows,
                           const std::vector<Reach>& columns, int64_t height, int64_t width,
                           int64_t channels, int64_t out_channels) {
  std::map<std::pair<int64_t, int64_t>, std::vector<int64_t>> row_kinds, column_kinds;
  for (size_t i = 0; i < rows.size(); ++i) row_kinds[{rows[i].tap, rows[i].count}].push_back(i);
  for (size_t j = 0; j < columns.size(); ++j)
    column_kinds[{columns[j].tap, columns[j].count}].push_back(j);
  std::vector<Class> all;
  for (const auto& [row_kind, of_rows] : row_kinds)
    for (const auto& [column_kind, of_columns] : column_kinds) {
      Class one{rows[of_rows[0]], columns[of_columns[0]], {}, {}};
      for (int64_t n = 0; n < images; ++n)
        for (int64_t i : of_rows)
          for (int64_t j : of_columns) {
            one.reads.push_back(
                ((n * height + rows[i].first) * width + columns[j].first) * channels);
            one.writes.push_back(
                ((n * int64_t(rows.size()) + i) * int64_t(columns.size()) + j) * out_channels);
          }
      all.push_back(std::move(one));
    }
  return all;
}

// Adds to each row of a register tile its input times the factors, which are vectors.
template <int kVectors, int kInputs, typename Input>
inline void add_products(Vector (&sums)[kInputs][kVectors], const float* factors,
                         const Input& input) {
  Vector loaded[kVectors];
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) loaded[v] = load(factors + v * kLanes);
#pragma GCC unroll 16
  for (int i = 0; i < kInputs; ++i) {
    const float value = input(i);
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sums[i][v] += value * loaded[v];
  }
}

// Outputs of a tile of pixels of a class: sums over taps of inputs times packed weights.
template <int kVectors>
void pixels_tile(const Class& one, size_t from, const float* inputs, int64_t row, int64_t channels,
                 const float* weights, int64_t taps_wide, float* outputs, int64_t lanes) {
  constexpr int kBlock = kVectors * kLanes;
  const float* at[kTile];
  for (int t = 0; t < kTile; ++t)
    at[t] = inputs + one.reads[std::min(from + t, one.reads.size() - 1)];
  Vector sums[kTile][kVectors] = {};
  const int64_t length = one.columns.count * channels;
  for (int64_t i = 0; i < one.rows.count; ++i) {
    const float* weight =
        weights + ((one.rows.tap + i) * taps_wide + one.columns.tap) * channels * kBlock;
    for (int64_t l = 0; l < length; ++l, weight += kBlock)
      add_products(sums, weight, [&](int t) { return at[t][l]; });
    for (int t = 0; t < kTile; ++t) at[t] += row;
  }
  for (int t = 0; t < kTile && from + t < one.writes.size(); ++t)
    for (int v = 0; v < kVectors && v * kLanes < lanes; ++v)
      store(outputs + one.writes[from + t] + v * kLanes, sums[t][v], lanes - v * kLanes);
}

// Sums over taps for all pixels: the convolution, and its transpose with respect to the images.
template <int kVectors>
void at_pixels(ffi::ThreadPool& pool, int64_t batch, const std::vector<Reach>& rows,
               const std::vector<Reach>& columns, int64_t height, int64_t width, int64_t channels,
               int64_t out_channels, const float* inputs, const float* weights,
               int64_t taps, int64_t taps_wide, float* outputs) {
  constexpr int kBlock = kVectors * kLanes;
  const int64_t in_size = height * width * channels;
  const int64_t out_size = int64_t(rows.size() * columns.size()) * out_channels;
  auto classes_of = [&](int64_t images) {
    return classes(images, rows, columns, height, width, channels, out_channels);
  };
  // A task is a block of channels of as many images as fit in the cache, or of fewer, so that there
  // are enough tasks for threads that are not equally fast.
  const int64_t blocks = (out_channels + kBlock - 1) / kBlock;
  const int64_t tasks = kTasks * std::max<int64_t>(1, pool.num_threads());
  const int64_t fitting = std::min(kCache / (4 * in_size), batch * blocks / tasks);
  const int64_t images = std::clamp<int64_t>(fitting, std::min<int64_t>(kTile, batch), batch);
  const int64_t group = std::min<int64_t>(kTile, images);
  // Of a class, even of a corner, a group of images has enough pixels for a tile. What is left over
  // is another number of images in the last task than in the others.
  const int64_t times = (batch + images - 1) / images;
  const std::vector<Class> whole = classes_of(group), rest = classes_of(images % group);
  const std::vector<Class> last = classes_of((batch - (times - 1) * images) % group);
  in_parallel(pool, times * blocks, [&](int64_t task) {
    const int64_t block = task % blocks, begin = task / blocks * images;
    const int64_t end = std::min(begin + images, batch);
    const std::vector<Class>& left = end == batch ? last : rest;
    const float* packed = weights + block * taps * channels * kBlock;
    const int64_t lanes = std::min<int64_t>(kBlock, out_channels - block * kBlock);
    for (int64_t start = begin; start < end; start += group)
      for (const Class& one : start + group <= end ? whole : left)
        for (size_t from = 0; from < one.reads.size(); from += kTile)
          pixels_tile<kVectors>(one, from, inputs + start * in_size, width * channels, channels,
                                packed, taps_wide, outputs + start * out_size + block * kBlock,
                                lanes);
  });
}

// The weights [block of out channels, taps, channels, channel of the block], zeros where a block is
// not full. Tap `i` of the pack is tap `order[i]` of the kernel. With `swapped`, the channels of the
// outputs are those that the kernel has for inputs.
const float* packed(ffi::ThreadPool& pool, const std::vector<int64_t>& order, int64_t channels,
                          int64_t out_channels, int64_t block, const float* kernel, bool swapped) {
  const int64_t blocks = (out_channels + block - 1) / block, taps = order.size();
  float* weights = scratch(blocks * taps * channels * block);
  in_parallel(pool, blocks * taps, [&](int64_t index) {
    const int64_t first = index / taps * block, full = std::min(block, out_channels - first);
    const float* from = kernel + order[index % taps] * channels * out_channels;
    float* to = weights + index * channels * block;
    if (full < block) std::memset(to, 0, sizeof(float) * channels * block);
    if (!swapped) {
      for (int64_t c = 0; c < channels; ++c)
        std::memcpy(to + c * block, from + c * out_channels + first, sizeof(float) * full);
      return;
    }
    constexpr int64_t kRun = 16;  // a cache line of what is read
    for (int64_t start = 0; start < channels; start += kRun)
      for (int64_t o = 0; o < full; ++o)
        for (int64_t c = start; c < std::min(start + kRun, channels); ++c)
          to[c * block + o] = from[(first + o) * channels + c];
  });
  return weights;
}

}  // namespace
