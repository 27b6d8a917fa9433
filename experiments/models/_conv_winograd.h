// Winograd's convolution F(2x2, 3x3) and its transposes, for kernels of 3x3 taps, stride 1 and many
// channels (Lavin and Gray, "Fast algorithms for convolutional neural networks", 2016).
//
// Four outputs, a tile of 2x2, are read off a tile of 4x4 inputs. Both and the kernel are transformed
// by small matrices B, A and G: outputs = A^T [(G kernel G^T) * (B^T inputs B)] A, where * multiplies
// place by place and sums over channels. That makes 16 products a tile and pair of channels in place
// of 36. The products of one of the 16 places are a product of matrices. The transforms go through
// memory, so tiles are worked on a few at a time, which fit in the cache. Rounding errors are no larger
// than those of plain sums, which have nine times as many terms.
//
// The transpose with respect to the images is the same convolution with the kernel turned around; that
// with respect to the kernel is G^T [sum over tiles of (B^T inputs B) * (A cotangents A^T)] G.

#pragma once

#include "_conv_cpu.h"

namespace {

constexpr int kPlaces = 16;                // of a transformed tile
constexpr int kRows = kLanes / 2;          // channels of a register tile of the kernel's gradient
constexpr int64_t kTransformed = 1 << 18;  // floats of transformed inputs, at most, at a time
constexpr int64_t kSummed = 1 << 20;       // floats of transformed inputs and cotangents, likewise
constexpr int64_t kLeastSummed = 64;       // but at least this many tiles
constexpr int64_t kInFirstCache = 128;     // tiles

// Fewer do not outweigh the transforms.
struct Least {
  int64_t channels, tiles;
};
constexpr Least kLeastOfConvolution{32, 256}, kLeastOfKernel{64, 100};

// The tiles of a number of images, one after another.
struct Tiles {
  int64_t batch, height, width, rows, columns, count;

  Tiles(int64_t batch, int64_t height, int64_t width)
      : batch(batch), height(height), width(width), rows((height + 1) / 2),
        columns((width + 1) / 2), count(batch * rows * columns) {}

  // Calls visit(index, pixel) for the pixels of a square of `side` pixels, of which the first is
  // `before` rows and columns before the tile's first; `pixel` is -1 outside of the image.
  template <typename Visit>
  void pixels(int64_t tile, int64_t before, int64_t side, const Visit& visit) const {
    const int64_t image = tile / (rows * columns), place = tile % (rows * columns);
    const int64_t top = place / columns * 2 - before, left = place % columns * 2 - before;
    for (int64_t i = 0; i < side; ++i)
      for (int64_t j = 0; j < side; ++j) {
        const int64_t y = top + i, x = left + j;
        const bool inside = y >= 0 && y < height && x >= 0 && x < width;
        visit(i * side + j, inside ? (image * height + y) * width + x : -1);
      }
  }
};

// Whether this is faster than plain sums; sizes alone decide.
bool suits_winograd(int64_t batch, const Axis& high, const Axis& wide, int64_t channels,
                    int64_t out_channels, Least least) {
  const bool fits = high.taps == 3 && wide.taps == 3 && high.stride == 1 && high.in > 2 &&
                    wide.in > 2 && channels % kLanes == 0 && out_channels % kLanes == 0;
  return fits && std::min(channels, out_channels) >= least.channels &&
         Tiles(batch, high.in, wide.in).count >= least.tiles;
}

// The small matrices, along one axis.

// B^T: four inputs.
void of_inputs(Vector* a, int step) {
  const Vector first = a[0] - a[2 * step], second = a[step] + a[2 * step];
  const Vector third = a[2 * step] - a[step], fourth = a[step] - a[3 * step];
  a[0] = first, a[step] = second, a[2 * step] = third, a[3 * step] = fourth;
}

// G: from three taps, of which the third is given, to four places.
void of_taps(Vector* a, int step) {
  const Vector even = .5f * (a[0] + a[2 * step]), odd = .5f * a[step];
  a[3 * step] = a[2 * step], a[step] = even + odd, a[2 * step] = even - odd;
}

// A^T: from four places to two outputs.
void to_outputs(Vector* a, int step) {
  const Vector second = a[step] - a[2 * step] - a[3 * step];
  a[0] = a[0] + a[step] + a[2 * step], a[step] = second;
}

// A: from two cotangents to four places.
void of_cotangents(Vector* a, int step) {
  const Vector sum = a[0] + a[step], difference = a[0] - a[step];
  a[3 * step] = -a[step], a[step] = sum, a[2 * step] = difference;
}

// G^T: from four places to three taps.
void to_taps(Vector* a, int step) {
  const Vector sum = .5f * (a[step] + a[2 * step]), difference = .5f * (a[step] - a[2 * step]);
  a[0] = a[0] + sum, a[step] = difference, a[2 * step] = sum + a[3 * step];
}

// Applies one of them to a square of 4x4, to so many columns, and then to so many rows.
template <void (*kAxis)(Vector*, int)>
void both_axes(Vector* square, int columns, int rows) {
#pragma GCC unroll 4
  for (int j = 0; j < columns; ++j) kAxis(square + j, 4);
#pragma GCC unroll 4
  for (int i = 0; i < rows; ++i) kAxis(square + 4 * i, 1);
}

// Transforms the weights [block, taps, channels, channel of the block] of `packed`, into
// [block, place, channels, channel of the block].
const float* transformed(ffi::ThreadPool& pool, int64_t blocks, int64_t channels, int64_t block,
                         const float* weights) {
  const int64_t size = channels * block;
  float* to = scratch<1>(blocks * kPlaces * size);
  in_parallel(pool, blocks * channels, [&](int64_t task) {
    const int64_t at = task % channels * block;
    const float* taps = weights + task / channels * 9 * size + at;
    float* places = to + task / channels * kPlaces * size + at;
    for (int64_t o = 0; o < block; o += kLanes) {
      Vector square[kPlaces];
      for (int k = 0; k < 9; ++k) square[k / 3 * 4 + k % 3] = load(taps + k * size + o);
      both_axes<of_taps>(square, 3, 4);
      for (int k = 0; k < kPlaces; ++k) store(places + k * size + o, square[k], kLanes);
    }
  });
  return to;
}

// Transforms a tile of 4x4 inputs; places are `step` floats apart, vectors of channels `next`.
void transform_inputs(const Tiles& tiles, int64_t tile, int64_t channels, const float* inputs,
                      float* to, int64_t step, int64_t next) {
  int64_t at[kPlaces];
  tiles.pixels(tile, 1, 4, [&](int64_t index, int64_t pixel) { at[index] = pixel * channels; });
  for (int64_t c = 0; c < channels; c += kLanes, to += next) {
    Vector square[kPlaces];
#pragma GCC unroll 16
    for (int k = 0; k < kPlaces; ++k) square[k] = at[k] < 0 ? Vector{} : load(inputs + at[k] + c);
    both_axes<of_inputs>(square, 4, 4);
#pragma GCC unroll 16
    for (int k = 0; k < kPlaces; ++k) store(to + k * step, square[k], kLanes);
  }
}

// Transforms a tile of 2x2 cotangents; blocks of channels are `next` floats apart.
template <int kVectors>
void transform_cotangents(const Tiles& tiles, int64_t tile, int64_t channels,
                          const float* cotangents, float* to, int64_t step, int64_t next) {
  constexpr int kBlock = kVectors * kLanes;
  int64_t at[4];
  tiles.pixels(tile, 0, 2, [&](int64_t index, int64_t pixel) { at[index] = pixel * channels; });
  for (int64_t c = 0; c < channels; c += kLanes) {
    Vector square[kPlaces];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k)
      square[k / 2 * 4 + k % 2] = at[k] < 0 ? Vector{} : load(cotangents + at[k] + c);
    both_axes<of_cotangents>(square, 2, 4);
#pragma GCC unroll 16
    for (int k = 0; k < kPlaces; ++k)
      store(to + k * step + c / kBlock * next + c % kBlock, square[k], kLanes);
  }
}

// Products of the tiles' inputs [tile, channel] with weights [channel, channel of the block].
template <int kVectors>
void multiply(int64_t tiles, int64_t channels, const float* inputs, const float* weights,
              float* products) {
  constexpr int kBlock = kVectors * kLanes;
  for (int64_t first = 0; first < tiles; first += kTile) {
    const float *at = inputs + first * channels, *weight = weights;
    Vector sums[kTile][kVectors] = {};
    for (int64_t c = 0; c < channels; ++c, weight += kBlock)
      add_products(sums, weight, [&](int t) { return at[t * channels + c]; });
    for (int t = 0; t < kTile; ++t)
      for (int v = 0; v < kVectors; ++v)
        store(products + (first + t) * kBlock + v * kLanes, sums[t][v], kLanes);
  }
}

// The convolution of images with weights that `packed` has made, by blocks of channels.
template <int kVectors>
void winograd(ffi::ThreadPool& pool, const Tiles& tiles, int64_t channels, int64_t out_channels,
              const float* inputs, const float* weights, float* outputs) {
  constexpr int kBlock = kVectors * kLanes;
  const int64_t blocks = (out_channels + kBlock - 1) / kBlock;
  weights = transformed(pool, blocks, channels, kBlock, weights);
  // A task is a number of whole register tiles, whose transforms fit in the second cache.
  const int64_t tasks = kTasks * std::max<int64_t>(1, pool.num_threads());
  const int64_t fitting = std::min(kTransformed / (kPlaces * channels), tiles.count / tasks);
  const int64_t count = std::max<int64_t>(1, fitting / kTile) * kTile;
  // A cache line more than the tiles need, so that places do not compete for the same lines.
  const int64_t step = count * channels + kLanes, product_step = count * kBlock + kLanes;
  in_parallel(pool, (tiles.count + count - 1) / count, [&](int64_t task) {
    const int64_t begin = task * count, here = std::min(count, tiles.count - begin);
    float* transforms = scratch<2>(kPlaces * step);
    float* products = scratch<3>(kPlaces * product_step);
    // The last is there several times, which fills a register tile.
    for (int64_t t = 0; t < (here + kTile - 1) / kTile * kTile; ++t)
      transform_inputs(tiles, begin + std::min(t, here - 1), channels, inputs,
                       transforms + t * channels, step, kLanes);
    for (int64_t b = 0; b < blocks; ++b) {
      for (int k = 0; k < kPlaces; ++k)
        multiply<kVectors>(here, channels, transforms + k * step,
                           weights + (b * kPlaces + k) * channels * kBlock,
                           products + k * product_step);
      const int64_t lanes = std::min<int64_t>(kBlock, out_channels - b * kBlock);
      for (int64_t t = 0; t < here; ++t)
        for (int64_t o = 0; o < lanes; o += kLanes) {
          Vector square[kPlaces];
#pragma GCC unroll 16
          for (int k = 0; k < kPlaces; ++k)
            square[k] = load(products + k * product_step + t * kBlock + o);
          both_axes<to_outputs>(square, 4, 2);
          tiles.pixels(begin + t, 0, 2, [&](int64_t index, int64_t pixel) {
            if (pixel >= 0)
              store(outputs + pixel * out_channels + b * kBlock + o,
                    square[index / 2 * 4 + index % 2], kLanes);
          });
        }
    }
  });
}

// Adds to `kRows` channels of a place of the transformed kernel's gradient the products of inputs
// [tile, channel of a vector] with cotangents [tile, channel of the block], or puts them there.
template <int kVectors>
void gradient_tile(int64_t tiles, const float* inputs, const float* cotangents, bool adds,
                   float* gradient) {
  constexpr int kBlock = kVectors * kLanes;
  Vector sums[kRows][kVectors] = {};
  for (int64_t t = 0; t < tiles; ++t, inputs += kLanes, cotangents += kBlock)
    add_products(sums, cotangents, [&](int j) { return inputs[j]; });
  for (int j = 0; j < kRows; ++j)
    for (int v = 0; v < kVectors; ++v) {
      float* to = gradient + j * kBlock + v * kLanes;
      store(to, adds ? load(to) + sums[j][v] : sums[j][v], kLanes);
    }
}

// The transpose of the convolution with respect to its kernel.
template <int kVectors>
void winograd_of_kernel(ffi::ThreadPool& pool, const Tiles& tiles, int64_t channels,
                        int64_t out_channels, const float* images, const float* cotangents,
                        float* kernel) {
  constexpr int kBlock = kVectors * kLanes;
  const int64_t blocks = (out_channels + kBlock - 1) / kBlock, vectors = channels / kLanes;
  const int64_t fitting = kSummed / (kPlaces * (channels + out_channels));
  const int64_t count = std::min(std::max(fitting, kLeastSummed), tiles.count);
  // Inputs [place, vector of channels, tile, channel of the vector], cotangents
  // [place, block, tile, channel of the block], sums [block, place, channel, channel of the block].
  const int64_t step = count * channels + kLanes, out_step = blocks * count * kBlock + kLanes;
  const int64_t size = channels * kBlock;
  float *inputs = scratch<1>(kPlaces * step), *outputs = scratch<2>(kPlaces * out_step);
  float* sums = scratch<3>(blocks * kPlaces * size);
  for (int64_t begin = 0; begin < tiles.count; begin += count) {
    const int64_t here = std::min(count, tiles.count - begin);
    in_parallel(pool, (here + kTile - 1) / kTile, [&](int64_t task) {
      for (int64_t t = task * kTile; t < std::min((task + 1) * kTile, here); ++t) {
        transform_inputs(tiles, begin + t, channels, images, inputs + t * kLanes, step,
                         count * kLanes);
        transform_cotangents<kVectors>(tiles, begin + t, out_channels, cotangents,
                                       outputs + t * kBlock, out_step, count * kBlock);
      }
    });
    in_parallel(pool, kPlaces * blocks, [&](int64_t task) {
      const int64_t block = task / kPlaces, k = task % kPlaces;
      // A few tiles stay in the first cache while all channels go through them.
      for (int64_t first = 0; first < here; first += kInFirstCache)
        for (int64_t c = 0; c < channels; c += kRows)
          gradient_tile<kVectors>(
              std::min(kInFirstCache, here - first),
              inputs + k * step + (c / kLanes * count + first) * kLanes + c % kLanes,
              outputs + k * out_step + (block * count + first) * kBlock, begin + first > 0,
              sums + task * size + c * kBlock);
    });
  }
  in_parallel(pool, blocks * channels, [&](int64_t task) {
    const int64_t block = task / channels, c = task % channels;
    const float* from = sums + block * kPlaces * size + c * kBlock;
    float* to = kernel + c * out_channels + block * kBlock;
    const int64_t lanes = std::min<int64_t>(kBlock, out_channels - block * kBlock);
    for (int64_t o = 0; o < lanes; o += kLanes) {
      Vector square[kPlaces];
      for (int k = 0; k < kPlaces; ++k) square[k] = load(from + k * size + o);
      both_axes<to_taps>(square, 4, 3);
      for (int k = 0; k < 9; ++k)
        store(to + k * channels * out_channels + o, square[k / 3 * 4 + k % 3], kLanes);
    }
  });
}

}  // namespace
