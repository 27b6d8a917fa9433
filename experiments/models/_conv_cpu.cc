// Convolution with zero padding, and its two transposes, in float32 on CPU, for XLA (its foreign
// function interface). Images are NHWC, kernels HWIO; `_native.py` compiles and calls this.
//
// All three are sums over taps (places of the kernel) at pixels. Pixels that meet the same taps, for
// instance all those in the middle of an image, are a class. In a class nothing is padding, so no
// padded copy of an image is made and nothing is multiplied by zero. A register tile is a few pixels
// of a class by one or two vectors of channels; the innermost loop runs over the taps of one row of
// the kernel, whose inputs lie one after another in memory.
//
// Every number is summed in an order that depends on the sizes alone: any number of threads gives
// the same bits.

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <utility>
#include <vector>

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
// Pixels (or taps) of a register tile: with two vectors of channels each, they leave registers for
// the factors.
#if defined(__AVX__) && !defined(__AVX512F__)
constexpr int kTile = 6, kRowsOfOne = 12, kRowsOfTwo = 6;
#else
constexpr int kTile = 8, kRowsOfOne = 16, kRowsOfTwo = 12;
#endif
typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

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

// Memory for `count` floats, in whole cache lines, until the next call on the same thread. It is kept,
// since pages that are fresh every time cost more than what is written to them.
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
    for (int64_t l = 0; l < length; ++l, weight += kBlock) {
      Vector factors[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v)
        factors[v] = load(weight + v * kLanes);
#pragma GCC unroll 8
      for (int t = 0; t < kTile; ++t) {
        const float input = at[t][l];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sums[t][v] += input * factors[v];
      }
    }
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
  // Of a class, even of a corner, a group of images has enough pixels for a tile.
  const std::vector<Class> whole = classes_of(group);
  in_parallel(pool, (batch + images - 1) / images * blocks, [&](int64_t task) {
    const int64_t block = task % blocks, begin = task / blocks * images;
    const int64_t end = std::min(begin + images, batch);
    const std::vector<Class> last = classes_of((end - begin) % group);
    const float* packed = weights + block * taps * channels * kBlock;
    const int64_t lanes = std::min<int64_t>(kBlock, out_channels - block * kBlock);
    for (int64_t start = begin; start < end; start += group)
      for (const Class& one : start + group <= end ? whole : last)
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

struct Sizes {
  int64_t batch, channels, out_channels;
  Axis high, wide;
};

Sizes sizes(ffi::Span<const int64_t> images, ffi::Span<const int64_t> kernel, int64_t stride) {
  auto axis = [&](int i) {
    return Axis{images[i + 1], (images[i + 1] + stride - 1) / stride, kernel[i], stride};
  };
  return {images[0], kernel[2], kernel[3], axis(0), axis(1)};
}

using Array = ffi::Buffer<ffi::F32>;
using Result = ffi::Result<Array>;

ffi::Error Forward(ffi::ThreadPool pool, Array images, Array kernel, Result outputs,
                   int64_t stride) {
  const Sizes s = sizes(images.dimensions(), kernel.dimensions(), stride);
  const int64_t taps = s.high.taps * s.wide.taps;
  std::vector<int64_t> order(taps);
  std::iota(order.begin(), order.end(), 0);
  auto run = [&]<int kVectors>() {
    at_pixels<kVectors>(pool, s.batch, s.high.forward(), s.wide.forward(), s.high.in, s.wide.in,
                        s.channels, s.out_channels, images.typed_data(),
                        packed(pool, order, s.channels, s.out_channels, kVectors * kLanes,
                               kernel.typed_data(), false),
                        taps, s.wide.taps, outputs->typed_data());
  };
  s.out_channels > kLanes ? run.template operator()<2>() : run.template operator()<1>();
  return ffi::Error::Success();
}

ffi::Error OfImages(ffi::ThreadPool pool, Array cotangents, Array kernel, Result images,
                    int64_t stride) {
  const Sizes s = sizes(images->dimensions(), kernel.dimensions(), stride);
  std::vector<int64_t> order;
  for (int64_t i : s.high.order())
    for (int64_t j : s.wide.order()) order.push_back(i * s.wide.taps + j);
  auto run = [&]<int kVectors>() {
    at_pixels<kVectors>(pool, s.batch, s.high.backward(), s.wide.backward(), s.high.out,
                        s.wide.out, s.out_channels, s.channels, cotangents.typed_data(),
                        packed(pool, order, s.out_channels, s.channels, kVectors * kLanes,
                               kernel.typed_data(), true),
                        order.size(), s.wide.taps, images->typed_data());
  };
  s.channels > kLanes ? run.template operator()<2>() : run.template operator()<1>();
  return ffi::Error::Success();
}

// Taps of one row of the kernel, one after another, that the same pixels meet: where these read the
// first of them, and where their cotangents are, counted in floats, for a number of images.
struct Window {
  int64_t tap, taps;
  std::vector<int32_t> reads, writes;
};

// Windows of a single tap each, or, with few channels, of as many taps as there are.
std::vector<Window> windows(const Sizes& s, int64_t images, int64_t out_channels) {
  const std::vector<Reach> rows = s.high.forward(), columns = s.wide.forward();
  const bool is_single = s.channels >= kFewChannels;
  std::map<std::pair<int64_t, int64_t>, Window> all;  // by the first tap and the number of taps
  for (int64_t p = 0; p < s.high.out; ++p)
    for (int64_t i = 0; i < rows[p].count; ++i)
      for (int64_t q = 0; q < s.wide.out; ++q)
        for (int64_t j = 0; j < (is_single ? columns[q].count : 1); ++j) {
          const int64_t tap = (rows[p].tap + i) * s.wide.taps + columns[q].tap + j;
          const int64_t taps = is_single ? 1 : columns[q].count;
          Window& window = all.try_emplace({tap, taps}, Window{tap, taps, {}, {}}).first->second;
          for (int64_t n = 0; n < images; ++n) {
            const int64_t row = n * s.high.in + rows[p].first + i, column = columns[q].first + j;
            window.reads.push_back((row * s.wide.in + column) * s.channels);
            window.writes.push_back(((n * s.high.out + p) * s.wide.out + q) * out_channels);
          }
        }
  std::vector<Window> values;
  for (auto& [_, window] : all) values.push_back(std::move(window));
  return values;
}

// What a tile of the kernel's gradient is made of: pixels of a window in `groups` groups of images,
// and in a last, smaller one.
struct Sum {
  const Window &group, &last;
  int64_t groups, in_size, out_size;  // floats of a group
  const float *inputs, *cotangents;
};

// Adds to `kRows` rows of the kernel's gradient, one or two vectors wide.
template <int kVectors, int kRows>
void kernel_tile(const Sum& sum, float* gradient, int64_t out_channels, int64_t lanes) {
  Vector sums[kRows][kVectors] = {};
  const float *inputs = sum.inputs, *cotangents = sum.cotangents;
  for (int64_t g = 0; g <= sum.groups; ++g) {
    const Window& window = g < sum.groups ? sum.group : sum.last;
    const int32_t *reads = window.reads.data(), *writes = window.writes.data();
    const size_t count = window.reads.size();
    for (size_t p = 0; p < count; ++p) {
      const float *input = inputs + reads[p], *cotangent = cotangents + writes[p];
      Vector factors[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) factors[v] = load(cotangent + v * kLanes);
#pragma GCC unroll 16
      for (int j = 0; j < kRows; ++j) {
        const float value = input[j];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sums[j][v] += value * factors[v];
      }
    }
    inputs += sum.in_size;
    cotangents += sum.out_size;
  }
  for (int j = 0; j < kRows; ++j)
    for (int v = 0; v < kVectors && v * kLanes < lanes; ++v) {
      float values[kLanes], *to = gradient + j * out_channels + v * kLanes;
      store(values, sums[j][v], kLanes);
      for (int64_t o = 0; o < std::min<int64_t>(kLanes, lanes - v * kLanes); ++o)
        to[o] += values[o];
    }
}

template <int kVectors, int kRows>
void kernel_rows(int64_t rows, const Sum& sum, float* gradient, int64_t out_channels,
                 int64_t lanes) {
  if (rows == kRows)
    kernel_tile<kVectors, kRows>(sum, gradient, out_channels, lanes);
  else if constexpr (kRows > 1)
    kernel_rows<kVectors, kRows - 1>(rows, sum, gradient, out_channels, lanes);
}

// Cotangents [batch, pixels, channels] as [block of channels, batch, pixels, channel of the block]:
// at the strides that they have, few would fit in the first cache at a time.
const float* in_blocks(ffi::ThreadPool& pool, int64_t batch, int64_t pixels, int64_t channels,
                       int64_t block, const float* cotangents) {
  if (channels == block) return cotangents;
  const int64_t blocks = (channels + block - 1) / block;
  float* copy = scratch(blocks * batch * pixels * block);
  in_parallel(pool, batch, [&](int64_t image) {
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t full = std::min(block, channels - b * block);
      const float* from = cotangents + image * pixels * channels + b * block;
      float* to = copy + (b * batch + image) * pixels * block;
      if (full < block) std::memset(to, 0, sizeof(float) * pixels * block);
      for (int64_t p = 0; p < pixels; ++p)
        std::memcpy(to + p * block, from + p * channels, sizeof(float) * full);
    }
  });
  return copy;
}

template <int kVectors>
void of_kernel(ffi::ThreadPool& pool, const Sizes& s, const float* images, const float* cotangents,
               float* gradient) {
  constexpr int kBlock = kVectors * kLanes, kRows = kVectors == 1 ? kRowsOfOne : kRowsOfTwo;
  const int64_t in_size = s.high.in * s.wide.in * s.channels;
  const int64_t pixels = s.high.out * s.wide.out, taps = s.high.taps * s.wide.taps;
  const int64_t blocks = (s.out_channels + kBlock - 1) / kBlock, out_size = pixels * kBlock;
  cotangents = in_blocks(pool, s.batch, pixels, s.out_channels, kBlock, cotangents);
  // Groups have lists of pixels; several groups are what is worked on at a time, in the cache.
  const int64_t group = std::clamp<int64_t>(kListed / pixels, 1, s.batch);
  const int64_t groups = std::max<int64_t>(1, kPixels / (pixels * group)), count = groups * group;
  const std::vector<Window> whole = windows(s, group, kBlock);
  const std::vector<Window> rest = windows(s, s.batch % group, kBlock), none = windows(s, 0, kBlock);
  std::memset(gradient, 0, sizeof(float) * taps * s.channels * s.out_channels);
  // Each task is a block of channels and, of the taps, one or a row of the kernel; nobody else adds
  // to these. It goes through all images.
  const int64_t owners = s.channels >= kFewChannels ? taps : s.high.taps;
  in_parallel(pool, blocks * owners, [&](int64_t task) {
    const int64_t block = task / owners, owner = task % owners;
    const int64_t lanes = std::min<int64_t>(kBlock, s.out_channels - block * kBlock);
    const float* of_block = cotangents + block * s.batch * out_size;
    for (int64_t start = 0; start < s.batch; start += count)
      for (size_t w = 0; w < whole.size(); ++w) {
        const int64_t first = whole[w].tap;
        if ((owners == taps ? first : first / s.wide.taps) != owner) continue;
        const int64_t rows = whole[w].taps * s.channels, tiles = (rows + kRows - 1) / kRows;
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t row = rows * t / tiles, end = rows * (t + 1) / tiles;
          const Sum sum{whole[w],
                        (start + count >= s.batch ? rest : none)[w],
                        std::min(groups, (s.batch - start) / group),
                        group * in_size,
                        group * out_size,
                        images + start * in_size + row,
                        of_block + start * out_size};
          kernel_rows<kVectors, kRows>(
              end - row, sum,
              gradient + (first * s.channels + row) * s.out_channels + block * kBlock,
              s.out_channels, lanes);
        }
      }
  });
}

ffi::Error OfKernel(ffi::ThreadPool pool, Array images, Array cotangents, Result kernel,
                    int64_t stride) {
  const Sizes s = sizes(images.dimensions(), kernel->dimensions(), stride);
  const float *in = images.typed_data(), *out = cotangents.typed_data();
  s.out_channels > kLanes ? of_kernel<2>(pool, s, in, out, kernel->typed_data())
                          : of_kernel<1>(pool, s, in, out, kernel->typed_data());
  return ffi::Error::Success();
}

auto binding() {
  return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Array>().Arg<Array>().Ret<Array>().Attr<int64_t>(
      "stride");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(MsgdConvForward, Forward, binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(MsgdConvOfImages, OfImages, binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(MsgdConvOfKernel, OfKernel, binding());
