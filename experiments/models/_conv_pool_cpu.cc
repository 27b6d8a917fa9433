// Convolution without padding, with a bias, 2x2 max-pooling and ReLU, and its derivatives, in float32
// on CPU, for XLA. Images are CHWN, kernels HWIO; `_native_pool.py` calls this.
//
// It is for few channels: a lane of a vector is an example, so that every product is of a full vector
// and one weight, or of two full vectors, whatever the number of channels. As many examples as a
// vector has lanes are a block, which is copied to where its pixels lie one after another.
//
// The largest pixel of a window has a place, 0 to 3 in row-major order, or kNone where ReLU made the
// output 0. Once places are known, the outputs are bilinear in images and kernel; the other three
// functions are that bilinear map and its transposes.
//
// Every number is summed in an order that depends on the sizes alone: any number of threads gives
// the same bits.

#include "_cpu.h"

namespace {

using Array = ffi::Buffer<ffi::F32>;
using Places = ffi::Buffer<ffi::S8>;
using Result = ffi::Result<Array>;

typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef int8_t Bytes __attribute__((vector_size(kLanes)));

constexpr int8_t kNone = 4;  // the place of an output that does not depend on its window
// Outputs of a register tile: for the four pixels of a window, for two pixels, and, with as many taps,
// for the gradient of a kernel.
#if defined(__AVX__) && !defined(__AVX512F__)
constexpr int kOfWindow = 2, kOfPair = 5, kOfTaps = 3;
#else
constexpr int kOfWindow = 5, kOfPair = 10, kOfTaps = 5;
#endif
constexpr int64_t kGroup = 40 << 10;  // bytes of cotangents that are worked on at a time
constexpr int64_t kParts = 16;        // that the gradient of a kernel is summed in, at most

struct Sizes {
  int64_t batch, channels, high, wide, out_channels, taps_high, taps_wide;

  int64_t blocks() const { return (batch + kLanes - 1) / kLanes; }
  int64_t pixels() const { return channels * high * wide; }
  int64_t taps() const { return channels * taps_high * taps_wide; }
  int64_t rows() const { return (high - taps_high + 1) / 2; }
  int64_t columns() const { return (wide - taps_wide + 1) / 2; }
};

Sizes sizes(ffi::Span<const int64_t> images, ffi::Span<const int64_t> kernel) {
  return {images[3], images[0], images[1], images[2], kernel[3], kernel[0], kernel[1]};
}

// `count` things in parts of at most `most`, as equal as they can be.
struct Parts {
  int64_t count, parts;

  Parts(int64_t count, int64_t most) : count(count), parts((count + most - 1) / most) {}
  int64_t first(int64_t part) const { return count * part / parts; }
  int64_t size(int64_t part) const { return first(part + 1) - first(part); }
};

// Calls the function with `count`, which is at most kMost, as a constant of the compiler's.
template <int kMost, typename Function>
void with_constant(int64_t count, const Function& function) {
  if (count == kMost)
    function.template operator()<kMost>();
  else if constexpr (kMost > 1)
    with_constant<kMost - 1>(count, function);
}

// The examples of one block in an array whose last axis is the batch.
struct Block {
  int64_t batch, first, lanes;

  Block(const Sizes& s, int64_t index)
      : batch(s.batch),
        first(index * kLanes),
        lanes(std::min<int64_t>(kLanes, s.batch - index * kLanes)) {}

  Vector values(const float* array, int64_t index) const { return get<Vector>(array, index); }

  Ints places(const int8_t* array, int64_t index) const {
    return __builtin_convertvector(get<Bytes>(array, index), Ints);
  }

  void put(float* array, int64_t index, Vector values) const { set(array, index, values); }

  void put(int8_t* array, int64_t index, Ints places) const {
    set(array, index, __builtin_convertvector(places, Bytes));
  }

  void copy(const float* array, int64_t count, float* to) const {
    for (int64_t i = 0; i < count; ++i) store(to + i * kLanes, values(array, i), kLanes);
  }

 private:
  // Lanes without an example are zero. A full vector has a case of its own, since the compiler then
  // knows the size.
  template <typename Lanes, typename Number>
  Lanes get(const Number* array, int64_t index) const {
    Lanes values = {};
    const Number* from = array + index * batch + first;
    if (lanes == kLanes)
      std::memcpy(&values, from, sizeof(Number) * kLanes);
    else
      std::memcpy(&values, from, sizeof(Number) * lanes);
    return values;
  }

  template <typename Lanes, typename Number>
  void set(Number* array, int64_t index, const Lanes& values) const {
    Number* to = array + index * batch + first;
    if (lanes == kLanes)
      std::memcpy(to, &values, sizeof(Number) * kLanes);
    else
      std::memcpy(to, &values, sizeof(Number) * lanes);
  }
};

// The weights in parts of the outputs: [part, input, row, column, output of the part]. With
// `swapped`, outputs are the channels that the kernel has for inputs.
const float* packed(const Sizes& s, const Parts& parts, const float* kernel, bool swapped) {
  const int64_t inputs = swapped ? s.out_channels : s.channels, taps = s.taps_high * s.taps_wide;
  float* const weights = scratch<0>(s.taps() * s.out_channels);
  float* to = weights;
  for (int64_t part = 0; part < parts.parts; ++part)
    for (int64_t c = 0; c < inputs; ++c)
      for (int64_t tap = 0; tap < taps; ++tap)
        for (int64_t o = parts.first(part); o < parts.first(part + 1); ++o)
          *to++ = swapped ? kernel[(tap * s.channels + o) * s.out_channels + c]
                          : kernel[(tap * s.channels + c) * s.out_channels + o];
  return weights;
}

// What tiles read: floats from one tap to the next, and the taps that they meet.
struct Reach {
  int64_t channels, channel, row, column;
  int64_t first_row, end_row, first_column, end_column;
};

// Sums over inputs and taps, at pixels whose values for the first tap are `at`.
template <int kPixels, int kOut>
inline void add_up(const float* const (&at)[kPixels], const Reach& reach, const Sizes& s,
                   const float* weights, Vector (&sums)[kPixels][kOut]) {
  for (int64_t c = 0; c < reach.channels; ++c)
    for (int64_t i = reach.first_row; i < reach.end_row; ++i) {
      int64_t offset = c * reach.channel + i * reach.row + reach.first_column * reach.column;
      const float* weight =
          weights + ((c * s.taps_high + i) * s.taps_wide + reach.first_column) * kOut;
      for (int64_t j = reach.first_column; j < reach.end_column; ++j) {
        Vector values[kPixels];
#pragma GCC unroll 4
        for (int p = 0; p < kPixels; ++p) values[p] = load(at[p] + offset);
#pragma GCC unroll 10
        for (int o = 0; o < kOut; ++o)
#pragma GCC unroll 4
          for (int p = 0; p < kPixels; ++p) sums[p][o] += weight[o] * values[p];
        offset += reach.column;
        weight += kOut;
      }
    }
}

// Convolves, and calls finish(block, index of the output, its window's four sums).
template <typename Finish>
void at_windows(ffi::ThreadPool& pool, const Sizes& s, const float* images, const float* kernel,
                const Finish& finish) {
  const Parts parts(s.out_channels, kOfWindow);
  const float* weights = packed(s, parts, kernel, false);
  in_parallel(pool, s.blocks() * parts.parts, [&](int64_t task) {
    const Block block(s, task / parts.parts);
    const int64_t part = task % parts.parts, first = parts.first(part), row = s.wide * kLanes;
    float* pixels = scratch<1>(s.pixels() * kLanes);
    block.copy(images, s.pixels(), pixels);
    const Reach reach{s.channels, s.high * row, row, kLanes, 0, s.taps_high, 0, s.taps_wide};
    with_constant<kOfWindow>(parts.size(part), [&]<int kOut>() {
      for (int64_t r = 0; r < s.rows(); ++r)
        for (int64_t c = 0; c < s.columns(); ++c) {
          const float* corner = pixels + 2 * (r * row + c * kLanes);
          const float* const window[4] = {corner, corner + kLanes, corner + row,
                                          corner + row + kLanes};
          Vector sums[4][kOut] = {};
          add_up(window, reach, s, weights + first * s.taps(), sums);
          for (int o = 0; o < kOut; ++o) {
            const Vector of_output[4] = {sums[0][o], sums[1][o], sums[2][o], sums[3][o]};
            finish(block, ((first + o) * s.rows() + r) * s.columns() + c, of_output);
          }
        }
    });
  });
}

ffi::Error Pool(ffi::ThreadPool pool, Array images, Array kernel, Array biases, Result outputs,
                ffi::Result<Places> places) {
  const Sizes s = sizes(images.dimensions(), kernel.dimensions());
  const float* bias = biases.typed_data();
  float* to = outputs->typed_data();
  int8_t* place_to = places->typed_data();
  const int64_t size = s.rows() * s.columns();
  auto finish = [&](const Block& block, int64_t index, const Vector(&sums)[4]) {
    Vector best = sums[0];
    Ints place = {};
    // The first of equal sums stays, and what is not a number.
    for (int p = 1; p < 4; ++p) {
      const Ints stays = (best >= sums[p]) | (best != best);
      best = stays ? best : sums[p];
      place = stays ? place : place * 0 + p;
    }
    best += bias[index / size];
    const Vector zero = {};
    block.put(to, index, best < zero ? zero : best);
    block.put(place_to, index, best > 0 ? place : place * 0 + kNone);
  };
  at_windows(pool, s, images.typed_data(), kernel.typed_data(), finish);
  return ffi::Error::Success();
}

ffi::Error Forward(ffi::ThreadPool pool, Array images, Array kernel, Places places,
                   Result outputs) {
  const Sizes s = sizes(images.dimensions(), kernel.dimensions());
  const int8_t* place_from = places.typed_data();
  float* to = outputs->typed_data();
  auto finish = [&](const Block& block, int64_t index, const Vector(&sums)[4]) {
    const Ints place = block.places(place_from, index);
    Vector chosen = {};
    for (int p = 0; p < 4; ++p) chosen = place == p ? sums[p] : chosen;
    block.put(to, index, chosen);
  };
  at_windows(pool, s, images.typed_data(), kernel.typed_data(), finish);
  return ffi::Error::Success();
}

// Cotangents of the sums of a block, [output, row, column], for rows of windows: each that of its
// window in its place, zero elsewhere. Rows have `margin` zeros at both ends.
void spread(const Sizes& s, const Block& block, int64_t first, int64_t end, int64_t margin,
            const float* cotangents, const int8_t* places, float* to) {
  const int64_t row = (2 * s.columns() + 2 * margin) * kLanes;
  for (int64_t o = 0; o < s.out_channels; ++o)
    for (int64_t r = first; r < end; ++r, to += 2 * row) {
      for (int half = 0; half < 2; ++half) {
        std::memset(to + half * row, 0, sizeof(float) * margin * kLanes);
        std::memset(to + (half + 1) * row - margin * kLanes, 0, sizeof(float) * margin * kLanes);
      }
      for (int64_t c = 0; c < s.columns(); ++c) {
        const int64_t index = (o * s.rows() + r) * s.columns() + c;
        const Vector cotangent = block.values(cotangents, index), zero = {};
        const Ints place = block.places(places, index);
        for (int p = 0; p < 4; ++p)
          store(to + p / 2 * row + (margin + 2 * c + p % 2) * kLanes,
                place == p ? cotangent : zero, kLanes);
      }
    }
}

ffi::Error OfImages(ffi::ThreadPool pool, Array cotangents, Array kernel, Places places,
                    Result images) {
  const Sizes s = sizes(images->dimensions(), kernel.dimensions());
  const Parts parts(s.channels, kOfPair);
  const float* weights = packed(s, parts, kernel.typed_data(), true);
  const int64_t rows = 2 * s.rows(), columns = 2 * s.columns(), row = (columns + 2) * kLanes;
  in_parallel(pool, s.blocks() * parts.parts, [&](int64_t task) {
    const Block block(s, task / parts.parts);
    const int64_t part = task % parts.parts, first = parts.first(part);
    float* sums_from = scratch<1>(s.out_channels * rows * row);
    spread(s, block, 0, s.rows(), 1, cotangents.typed_data(), places.typed_data(), sums_from);
    with_constant<kOfPair>(parts.size(part), [&]<int kOut>() {
      for (int64_t y = 0; y < s.high; ++y)
        for (int64_t x = 0; x < s.wide; x += 2) {
          // Tap (i, j) is between pixel (y, x) and sum (y - i, x - j). Of two pixels side by side,
          // one may meet a zero of the margin.
          const Reach reach{s.out_channels,
                            rows * row,
                            -row,
                            -kLanes,
                            std::max<int64_t>(0, y - rows + 1),
                            std::min(s.taps_high, y + 1),
                            std::max<int64_t>(0, x - columns + 1),
                            std::min(s.taps_wide, x + 2)};
          const float* corner = sums_from + y * row + (x + 1) * kLanes;
          const float* const pair[2] = {corner, corner + kLanes};
          Vector sums[2][kOut] = {};
          add_up(pair, reach, s, weights + first * s.out_channels * s.taps_high * s.taps_wide,
                 sums);
          for (int p = 0; p < 2 && x + p < s.wide; ++p)
            for (int o = 0; o < kOut; ++o)
              block.put(images->typed_data(), ((first + o) * s.high + y) * s.wide + x + p,
                        sums[p][o]);
        }
    });
  });
  return ffi::Error::Success();
}

// Adds to the gradient of weights, of kTaps side by side and kOut outputs, what some rows of a block
// have a part in. Gradients are vectors, whose lanes are not summed yet.
template <int kTaps, int kOut>
void kernel_tile(int64_t rows, int64_t columns, int64_t width, int64_t out_channels,
                 const float* pixels, const float* cotangents, float* gradient) {
  Vector sums[kTaps][kOut];
  for (int t = 0; t < kTaps; ++t)
    for (int o = 0; o < kOut; ++o) sums[t][o] = load(gradient + (t * out_channels + o) * kLanes);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) {
      const float* pixel = pixels + (r * width + c) * kLanes;
      const float* cotangent = cotangents + (r * columns + c) * kLanes;
      Vector values[kTaps];
#pragma GCC unroll 5
      for (int t = 0; t < kTaps; ++t) values[t] = load(pixel + t * kLanes);
#pragma GCC unroll 5
      for (int o = 0; o < kOut; ++o) {
        const Vector factor = load(cotangent + o * rows * columns * kLanes);
#pragma GCC unroll 5
        for (int t = 0; t < kTaps; ++t) sums[t][o] += values[t] * factor;
      }
    }
  for (int t = 0; t < kTaps; ++t)
    for (int o = 0; o < kOut; ++o)
      store(gradient + (t * out_channels + o) * kLanes, sums[t][o], kLanes);
}

// The same for all weights of the kernel; gradient [channel, row, column, output].
void add_rows(const Sizes& s, int64_t rows, const float* pixels, const float* cotangents,
              float* gradient) {
  const Parts taps(s.taps_wide, kOfTaps), outputs(s.out_channels, kOfTaps);
  const int64_t columns = 2 * s.columns();
  for (int64_t c = 0; c < s.channels; ++c)
    for (int64_t i = 0; i < s.taps_high; ++i)
      for (int64_t t = 0; t < taps.parts; ++t)
        with_constant<kOfTaps>(taps.size(t), [&]<int kTaps>() {
          const int64_t j = taps.first(t), tap = (c * s.taps_high + i) * s.taps_wide + j;
          for (int64_t part = 0; part < outputs.parts; ++part)
            with_constant<kOfTaps>(outputs.size(part), [&]<int kOut>() {
              const int64_t o = outputs.first(part);
              kernel_tile<kTaps, kOut>(rows, columns, s.wide, s.out_channels,
                                       pixels + ((c * s.high + i) * s.wide + j) * kLanes,
                                       cotangents + o * rows * columns * kLanes,
                                       gradient + (tap * s.out_channels + o) * kLanes);
            });
        });
}

ffi::Error OfKernel(ffi::ThreadPool pool, Array images, Array cotangents, Places places,
                    Result kernel) {
  const Sizes s = sizes(images.dimensions(), kernel->dimensions());
  const int64_t blocks = s.blocks(), parts = std::min(blocks, kParts);
  const int64_t weights = s.taps() * s.out_channels;
  const int64_t of_row = 4 * s.out_channels * s.columns() * kLanes;  // of windows
  const int64_t group =
      std::clamp<int64_t>(kGroup / (sizeof(float) * of_row), 1, std::max<int64_t>(1, s.rows()));
  float* gradients = scratch<0>(parts * weights * kLanes);
  in_parallel(pool, parts, [&](int64_t part) {
    float* gradient = gradients + part * weights * kLanes;
    std::memset(gradient, 0, sizeof(float) * weights * kLanes);
    float* pixels = scratch<1>(s.pixels() * kLanes + group * of_row);
    float* sums = pixels + s.pixels() * kLanes;
    for (int64_t b = blocks * part / parts; b < blocks * (part + 1) / parts; ++b) {
      const Block block(s, b);
      block.copy(images.typed_data(), s.pixels(), pixels);
      for (int64_t r = 0; r < s.rows(); r += group) {
        const int64_t end = std::min(r + group, s.rows());
        spread(s, block, r, end, 0, cotangents.typed_data(), places.typed_data(), sums);
        add_rows(s, 2 * (end - r), pixels + 2 * r * s.wide * kLanes, sums, gradient);
      }
    }
  });
  // Parts are added in order, then lanes.
  const int64_t taps = s.taps_high * s.taps_wide;
  in_parallel(pool, s.channels, [&](int64_t c) {
    for (int64_t w = 0; w < taps * s.out_channels; ++w) {
      const float* from = gradients + (c * taps * s.out_channels + w) * kLanes;
      Vector sum = {};
      for (int64_t part = 0; part < parts; ++part) sum += load(from + part * weights * kLanes);
      float lanes[kLanes];
      store(lanes, sum, kLanes);
      for (int half = kLanes / 2; half > 0; half /= 2)
        for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
      const int64_t tap = w / s.out_channels, o = w % s.out_channels;
      kernel->typed_data()[(tap * s.channels + c) * s.out_channels + o] = lanes[0];
    }
  });
  return ffi::Error::Success();
}

auto binding() {
  return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Array>().Arg<Array>().Arg<Places>().Ret<Array>();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(MsgdPoolForward, Forward, binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(MsgdPoolOfImages, OfImages, binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(MsgdPoolOfKernel, OfKernel, binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    MsgdPool, Pool,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Array>().Arg<Array>().Arg<Array>().Ret<Array>().Ret<
        Places>());
