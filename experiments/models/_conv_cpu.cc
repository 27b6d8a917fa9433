// Convolution with zero padding, and its two transposes, in float32 on CPU, for XLA (its foreign
// function interface). Images are NHWC, kernels HWIO; `_native.py` compiles and calls this.
//
// All three are sums over taps (places of the kernel) at pixels. Pixels that meet the same taps, for
// instance all those in the middle of an image, are a class. In a class nothing is padding, so no
// padded copy of an image is made and nothing is multiplied by zero. A register tile is a few pixels
// of a class by one or two vectors of channels; the innermost loop runs over the taps of one row of
// the kernel, whose inputs lie one after another in memory. Where kernels are 3x3 and channels many,
// `_conv_winograd.h` needs fewer products and takes over.
//
// Every number is summed in an order that depends on the sizes alone: any number of threads gives
// the same bits.

#include "_conv_cpu.h"
#include "_conv_winograd.h"

#include <map>
#include <numeric>
#include <utility>
#include <vector>

namespace {

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

// The convolution, or, if `swapped`, its transpose with respect to the images: sums over the same taps
// in another order, with the channels of inputs and outputs exchanged.
void convolve(ffi::ThreadPool& pool, const Sizes& s, bool swapped, const float* inputs,
              const float* kernel, float* outputs) {
  auto taps = [&](const Axis& axis) {
    std::vector<int64_t> ascending(axis.taps);
    std::iota(ascending.begin(), ascending.end(), 0);
    return swapped ? axis.order() : ascending;
  };
  std::vector<int64_t> order;
  for (int64_t i : taps(s.high))
    for (int64_t j : taps(s.wide)) order.push_back(i * s.wide.taps + j);
  const int64_t channels = swapped ? s.out_channels : s.channels;
  const int64_t out_channels = swapped ? s.channels : s.out_channels;
  auto run = [&]<int kVectors>() {
    const float* weights =
        packed(pool, order, channels, out_channels, kVectors * kLanes, kernel, swapped);
    if (suits_winograd(s.batch, s.high, s.wide, channels, out_channels, kLeastOfConvolution))
      return winograd<kVectors>(pool, {s.batch, s.high.in, s.wide.in}, channels, out_channels,
                                inputs, weights, outputs);
    at_pixels<kVectors>(pool, s.batch, swapped ? s.high.backward() : s.high.forward(),
                        swapped ? s.wide.backward() : s.wide.forward(),
                        swapped ? s.high.out : s.high.in, swapped ? s.wide.out : s.wide.in,
                        channels, out_channels, inputs, weights, order.size(), s.wide.taps,
                        outputs);
  };
  out_channels > kLanes ? run.template operator()<2>() : run.template operator()<1>();
}

ffi::Error Forward(ffi::ThreadPool pool, Array images, Array kernel, Result outputs,
                   int64_t stride) {
  convolve(pool, sizes(images.dimensions(), kernel.dimensions(), stride), false,
           images.typed_data(), kernel.typed_data(), outputs->typed_data());
  return ffi::Error::Success();
}

ffi::Error OfImages(ffi::ThreadPool pool, Array cotangents, Array kernel, Result images,
                    int64_t stride) {
  convolve(pool, sizes(images->dimensions(), kernel.dimensions(), stride), true,
           cotangents.typed_data(), kernel.typed_data(), images->typed_data());
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

// What a tile of the kernel's gradient is made of: pixels of a window, from `begin` to `end` of those
// that are listed, in `groups` groups of images, and in a last, smaller one.
struct Sum {
  const Window &group, &last;
  size_t begin, end;
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
    const size_t end = std::min(sum.end, window.reads.size());
    for (size_t p = sum.begin; p < end; ++p) {
      const float* input = inputs + reads[p];
      add_products(sums, cotangents + writes[p], [&](int j) { return input[j]; });
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
  if (suits_winograd(s.batch, s.high, s.wide, s.channels, s.out_channels, kLeastOfKernel))
    return winograd_of_kernel<kVectors>(pool, {s.batch, s.high.in, s.wide.in}, s.channels,
                                        s.out_channels, images, cotangents, gradient);
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
  // Each task is a block of channels and, of the taps, a row of the kernel, or only one if there are
  // many threads; nobody else adds to these. It goes through all images, which are read from memory
  // each time.
  const bool is_row = s.channels < kFewChannels || blocks * s.high.taps >= 2 * pool.num_threads();
  const int64_t owners = is_row ? s.high.taps : taps;
  in_parallel(pool, blocks * owners, [&](int64_t task) {
    const int64_t block = task / owners, owner = task % owners;
    const int64_t lanes = std::min<int64_t>(kBlock, s.out_channels - block * kBlock);
    const float* of_block = cotangents + block * s.batch * out_size;
    for (int64_t start = 0; start < s.batch; start += count)
      for (size_t w = 0; w < whole.size(); ++w) {
        const int64_t first = whole[w].tap;
        if ((is_row ? first / s.wide.taps : first) != owner) continue;
        const int64_t rows = whole[w].taps * s.channels, tiles = (rows + kRows - 1) / kRows;
        // Large images are worked on in parts, which all tiles go through while they are in the cache.
        const int64_t listed = whole[w].reads.size(), parts = (listed + kPixels - 1) / kPixels;
        for (int64_t i = 0; i < parts * tiles; ++i) {
          const int64_t part = i / tiles, t = i % tiles;
          const int64_t row = rows * t / tiles, end = rows * (t + 1) / tiles;
          const Sum sum{whole[w],
                        (start + count >= s.batch ? rest : none)[w],
                        size_t(listed * part / parts),
                        size_t(listed * (part + 1) / parts),
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
