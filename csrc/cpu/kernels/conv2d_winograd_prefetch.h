// Images too large for the caches, fetched into the second level while the products of other tiles are computed: those keep
// the multipliers busy and let the memory rest, the transforms do the opposite. A prefetch never faults: cache lines beyond
// an image's edge do no harm.
#pragma once
#include "../cache_size.h"
#include "conv2d_winograd_problem.h"

namespace cvfast {
namespace {

constexpr int64_t cache_line = 64;  // bytes

// The pixels of tiles, a few cache lines at each call.
template <class S>
class TilePrefetcher {
 public:
  struct Tiles {
    TileGrid grid;
    int64_t scale_y, scale_x;  // pixels per pixel of the grid
    int64_t first, count, channels;
  };

  // Of the images at `data` with strides for batch, channel, line and pixel, in `calls` calls.
  TilePrefetcher(const S* data, const int64_t (&stride)[4], Tiles tiles, int64_t calls)
      : data_(data), stride_{stride[0], stride[1], stride[2], stride[3]}, tiles_(tiles), tile_(tiles.first) {
    const int64_t width = tiles.scale_x * winograd_outputs;
    height_ = tiles.scale_y * winograd_outputs;
    if (stride[1] == 1)
      runs_ = width, run_stride_ = stride[3] * size, run_bytes_ = tiles.channels * size, tiles_per_line_ = 1;
    else
      runs_ = tiles.channels, run_stride_ = stride[1] * size, run_bytes_ = cache_line,
      tiles_per_line_ = max<int64_t>(1, cache_line / (width * size));
    const int64_t lines = tiles.count * height_ * runs_ * ceil_div(run_bytes_, cache_line) / tiles_per_line_;
    lines_per_call_ = ceil_div(lines, max<int64_t>(calls, 1));
    begin_tile();
  }
  void operator()() {
    for (int64_t i = 0; i < lines_per_call_ && tile_ < tiles_.first + tiles_.count; ++i) fetch_line();
  }

 private:
  static constexpr int64_t size = sizeof(S);

  void begin_tile() {
    if (tile_ >= tiles_.first + tiles_.count) return;
    const WinogradTile tile = tiles_.grid.tile_at(tile_);
    at_ = reinterpret_cast<const char*>(data_ + tile.n * stride_[0] + tile.y * tiles_.scale_y * stride_[2] +
                                        tile.x * tiles_.scale_x * stride_[3]);
    offset_ = run_ = y_ = 0;
  }
  void fetch_line() {
    __builtin_prefetch(at_ + offset_, 1, 2);
    if ((offset_ += cache_line) < run_bytes_) return;
    offset_ = 0, at_ += run_stride_;
    if (++run_ < runs_) return;
    run_ = 0, at_ += stride_[2] * size - runs_ * run_stride_;
    if (++y_ < height_) return;
    tile_ += min(tiles_per_line_, tiles_.grid.tiles_beside(tile_));
    begin_tile();
  }

  const S* data_;
  int64_t stride_[4];
  Tiles tiles_;
  int64_t tile_;  // the one whose pixels come next
  int64_t height_;  // of a tile
  int64_t runs_, run_stride_, run_bytes_;  // of a line of pixels: stretches of neighbours in memory
  int64_t tiles_per_line_;                 // a cache line's pixels; tiles that lie side by side in one image
  int64_t lines_per_call_;
  const char* at_;
  int64_t offset_, run_, y_;
};

// Whether the images hardly stay in the caches from one call to the next.
template <class S>
bool images_are_large(const Conv2dShape& s) {
  const int64_t elements = s.in_channels * s.in_height * s.in_width + s.out_channels * s.out_height * s.out_width;
  return s.batch * elements * static_cast<int64_t>(sizeof(S)) > 8 * l2_cache_bytes();
}

// What the transform of `count` tiles from `first` on will read.
template <class S, int Taps>
TilePrefetcher<S> source_prefetcher(const Winograd<S, Taps>& w, int64_t first, int64_t count, int64_t calls) {
  const auto& source = w.source;
  return {w.c.source, w.c.source_stride,
          {source.grid, w.phase.patches.y.step, w.phase.patches.x.step, first, count, source.groups * source.channels}, calls};
}

// What the results of `count` tiles from `first` on will be written to, of `channels` channels from `channel` on.
template <class S, int Taps>
TilePrefetcher<S> result_prefetcher(const Winograd<S, Taps>& w, int64_t first, int64_t count, int64_t channel,
                                    int64_t channels, int64_t calls) {
  const Phase<S>& p = w.phase;
  return {p.result + channel * p.result_channel_stride,
          {p.result_batch_stride, p.result_channel_stride, p.result_y_stride, p.result_x_stride},
          {w.source.grid, 1, 1, first, count, channels}, calls};
}

}  // namespace
}  // namespace cvfast
