// Paged attention of a step: online softmax over fixed tiles of 64 positions, counted from 0
// (Milakov and Gimelshein 2018, arXiv:1805.02867; the tiling is that of arXiv:2205.14135).
//
// A query's result is a chain over its own tiles, first to last: scores, maximum, weights, weighted
// values added to what there is. Every number in it is computed by the same instructions in the same
// order, whichever rows, chunks or threads are at work beside it; a tile that a query sees nothing of
// leaves all its bits as they are. So results are equal bit by bit at any batch and chunking.
//
// Rows with few queries (decode) pack each tile where they stand, since they read it once. Rows with
// many (prefill) pack all of a sequence first and then go through it group of queries by group.
#include "attention.h"

#include "kv_tile.hpp"
#include "threads.hpp"

namespace pdserve::PDSERVE_LEVEL {
namespace {

constexpr int kGroupRows = 24;                 // query heads of a group, about: fits the L1 cache
constexpr int64_t kPackedBytes = int64_t{8} << 20;  // of packed sequence at once, about
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kMinusInfinity = -__builtin_inff();

template <class Format>
class Step {
 public:
  using Element = typename Format::Element;

  explicit Step(const pdserve_attention_args& args)
      : args_(args),
        heads_per_kv_(args.num_heads / args.num_kv_heads),
        units_(args.head_dim / Format::kUnit),
        columns_((args.head_dim + kWidth - 1) / kWidth * kWidth),
        group_queries_(heads_per_kv_ < kGroupRows ? kGroupRows / heads_per_kv_ : 1),
        key_size_(int64_t{units_} * kTile),
        value_size_(int64_t{kTile / Format::kUnit} * columns_),
        factor_(args.scale * kLog2E) {}

  void run() {
    for (int r = 0; r < args_.num_rows; ++r) {
      if (args_.rows[r].num_tokens > group_queries_) run_long(args_.rows[r]);
    }
    auto item = [&](int64_t index, int) {
      const pdserve_row& row = args_.rows[index / args_.num_kv_heads];
      if (row.num_tokens > group_queries_) return;
      attend(row, static_cast<int>(index % args_.num_kv_heads), 0, row.num_tokens, nullptr);
    };
    parallel_for(args_.num_threads, int64_t{args_.num_rows} * args_.num_kv_heads, item);
  }

 private:
  void run_long(const pdserve_row& row) {
    const int num_tiles = tiles(row.start + row.num_tokens);
    const int64_t tile_size = key_size_ + value_size_;
    const int64_t head_bytes = num_tiles * tile_size * 4;
    int num_heads = static_cast<int>(kPackedBytes / head_bytes);
    num_heads = num_heads < 1 ? 1 : num_heads;
    num_heads = num_heads > args_.num_kv_heads ? args_.num_kv_heads : num_heads;
    auto* packed = static_cast<float*>(scratch(0, num_heads * head_bytes));
    const int num_groups = (row.num_tokens + group_queries_ - 1) / group_queries_;
    for (int head = 0; head < args_.num_kv_heads; head += num_heads) {
      const int left = args_.num_kv_heads - head;
      const int count = left < num_heads ? left : num_heads;
      auto pack_item = [&](int64_t index, int) {
        const int tile = static_cast<int>(index % num_tiles);
        pack(row, head + static_cast<int>(index / num_tiles), tile, packed + index * tile_size);
      };
      parallel_for(args_.num_threads, int64_t{count} * num_tiles, pack_item);
      auto attend_item = [&](int64_t index, int) {
        const int which = static_cast<int>(index / num_groups);
        const int group = num_groups - 1 - static_cast<int>(index % num_groups);
        const int first = group * group_queries_;
        const int rest = row.num_tokens - first;
        attend(row, head + which, first, rest < group_queries_ ? rest : group_queries_,
               packed + which * num_tiles * tile_size);
      };
      parallel_for(args_.num_threads, int64_t{count} * num_groups, attend_item);
    }
  }

  static int tiles(int positions) { return (positions + kTile - 1) / kTile; }

  TileRows<Element> locate(const pdserve_row& row, int kv_head, int tile) const {
    TileRows<Element> found;
    const int64_t run = int64_t{args_.block_size} * args_.head_dim;
    found.to_values = run * args_.num_kv_heads;
    const int end = row.start + row.num_tokens - tile * kTile;
    found.count = end < kTile ? end : kTile;
    const auto* kv = static_cast<const Element*>(args_.kv) + kv_head * run;
    const int32_t* table = args_.tables + row.first_block;
    int block = tile * kTile / args_.block_size;
    int offset = tile * kTile % args_.block_size;
    for (int j = 0; j < found.count; ++block, offset = 0) {
      const Element* at =
          kv + (table[block] * int64_t{2} * args_.num_kv_heads * run) + offset * args_.head_dim;
      for (; offset < args_.block_size && j < found.count; ++offset, ++j) {
        found.keys[j] = at;
        at += args_.head_dim;
      }
    }
    for (int j = found.count; j < kTile; ++j) found.keys[j] = found.keys[0];
    return found;
  }

  void pack(const pdserve_row& row, int kv_head, int tile, float* out) const {
    const TileRows<Element> rows = locate(row, kv_head, tile);
    pack_keys<Format>(rows, args_.head_dim, out);
    pack_values<Format>(rows, args_.head_dim, columns_, out + key_size_);
  }

  void prefetch(const pdserve_row& row, int kv_head, int tile) const {
    const TileRows<Element> rows = locate(row, kv_head, tile);
    const int64_t bytes = args_.head_dim * static_cast<int64_t>(sizeof(Element));
    for (int j = 0; j < rows.count; ++j) {
      const auto* key = reinterpret_cast<const char*>(rows.keys[j]);
      const auto* value = reinterpret_cast<const char*>(rows.keys[j] + rows.to_values);
      for (int64_t at = 0; at < bytes; at += 64) {
        __builtin_prefetch(key + at);
        __builtin_prefetch(value + at);
      }
    }
  }

  // `count` queries of a row, from its `first` on, for the query heads of one kv head. Tiles come
  // from `packed`, or else from the pool.
  void attend(const pdserve_row& row, int kv_head, int first, int count, const float* packed) {
    const int num_rows = count * heads_per_kv_;
    const int64_t tile_size = key_size_ + value_size_;
    const int64_t own = packed == nullptr ? tile_size : 0;
    auto* memory = static_cast<float*>(scratch(
        1, 4 * (own + num_rows * int64_t{units_ + kTile + columns_ + kWidth + 1})));
    float* const tile_memory = memory;
    float* const scores = tile_memory + own;                            // [row, 64]
    float* const sums = scores + int64_t{num_rows} * kTile;             // [row, columns]
    float* const queries = sums + int64_t{num_rows} * columns_;         // [row, unit]
    float* const weight_sums = queries + int64_t{num_rows} * units_;    // [row, lane]
    float* const maxima = weight_sums + int64_t{num_rows} * kWidth;     // [row]
    load_queries(row, kv_head, first, count, queries);
    std::memset(sums, 0, sizeof(float) * num_rows * columns_);
    std::memset(weight_sums, 0, sizeof(float) * num_rows * kWidth);
    for (int r = 0; r < num_rows; ++r) maxima[r] = kMinusInfinity;
    const int position = row.start + first;
    const int num_tiles = tiles(position + count);
    for (int tile = 0; tile < num_tiles; ++tile) {
      const float* keys = packed + tile * tile_size;
      if (packed == nullptr) {
        if (tile + 1 < num_tiles) prefetch(row, kv_head, tile + 1);
        pack(row, kv_head, tile, tile_memory);
        keys = tile_memory;
      }
      product<typename Format::Kind, false>(num_rows, kTile, units_, queries, units_, keys, kTile,
                                            scores, kTile);
      for (int r = 0; r < num_rows; ++r) {
        const int visible = position + r / heads_per_kv_ + 1 - tile * kTile;
        weigh(scores + r * kTile, visible, maxima + r, weight_sums + r * kWidth,
              sums + int64_t{r} * columns_);
      }
      product<typename Format::Kind, true>(num_rows, columns_, kTile / Format::kUnit, scores, kTile,
                                           keys + key_size_, columns_, sums, columns_);
    }
    for (int r = 0; r < num_rows; ++r) {
      const Vec sum = splat(reduce_add(load(weight_sums + r * kWidth)));
      float* const row_sums = sums + int64_t{r} * columns_;
      for (int d = 0; d < columns_; d += kWidth) store(row_sums + d, div(load(row_sums + d), sum));
      store_result(row, kv_head, first, r, row_sums);
    }
  }

  void load_queries(const pdserve_row& row, int kv_head, int first, int count, float* out) const {
    const int width = heads_per_kv_ * args_.head_dim;
    for (int q = 0; q < count; ++q, out += heads_per_kv_ * units_) {
      const int64_t at = (row.first + first + q) * args_.query_stride + int64_t{kv_head} * width;
      if (args_.queries_are_bf16) {
        load_query(static_cast<const bf16*>(args_.queries) + at, width, out);
      } else {
        load_query(static_cast<const float*>(args_.queries) + at, width, out);
      }
    }
  }

  static void load_query(const float* query, int width, float* out) {
    if constexpr (Format::kUnit == 1) {
      std::memcpy(out, query, sizeof(float) * width);
    } else {
      auto* const narrowed = reinterpret_cast<bf16*>(out);
      int d = 0;
      for (; d + kWidth <= width; d += kWidth) narrow(narrowed + d, load(query + d));
      for (; d < width; ++d) narrowed[d] = narrow(query[d]);
    }
  }

  static void load_query(const bf16* query, int width, float* out) {
    if constexpr (Format::kUnit == 2) {
      std::memcpy(out, query, sizeof(bf16) * width);
    } else {
      for (int d = 0; d < width; ++d) out[d] = widen(query[d]);
    }
  }

  // Scores of one query head become weights in place. The first `visible` positions are seen.
  PDSERVE_INLINE void weigh(float* scores, int visible, float* maximum, float* weight_sums,
                            float* sums) const {
    for (int j = visible < 0 ? 0 : visible; j < kTile; ++j) scores[j] = kMinusInfinity;
    Vec highest = load(scores);
#pragma GCC unroll 16
    for (int j = kWidth; j < kTile; j += kWidth) highest = max(highest, load(scores + j));
    const float here = reduce_max(highest);
    Vec weight_sum = load(weight_sums);
    if (!(here <= *maximum)) {
      const Vec shrink = exp2(splat((*maximum - here) * factor_));
      *maximum = here;
      weight_sum = mul(weight_sum, shrink);
      for (int d = 0; d < columns_; d += kWidth) store(sums + d, mul(load(sums + d), shrink));
    }
    const Vec factor = splat(factor_), shift = splat(-(*maximum * factor_));
#pragma GCC unroll 16
    for (int j = 0; j < kTile; j += kWidth) {
      const Vec weight = exp2(fma(load(scores + j), factor, shift));
      weight_sum = add(weight_sum, weight);
      if constexpr (Format::kUnit == 2) {
        narrow(reinterpret_cast<bf16*>(scores) + j, weight);
      } else {
        store(scores + j, weight);
      }
    }
    store(weight_sums, weight_sum);
  }

  void store_result(const pdserve_row& row, int kv_head, int first, int r, const float* from) const {
    const int64_t head = int64_t{kv_head} * heads_per_kv_ + r % heads_per_kv_;
    const int64_t at =
        (row.first + first + r / heads_per_kv_) * args_.out_stride + head * args_.head_dim;
    if (!args_.out_is_bf16) {
      std::memcpy(static_cast<float*>(args_.out) + at, from, sizeof(float) * args_.head_dim);
      return;
    }
    auto* const to = static_cast<bf16*>(args_.out) + at;
    int d = 0;
    for (; d + kWidth <= args_.head_dim; d += kWidth) narrow(to + d, load(from + d));
    for (; d < args_.head_dim; ++d) to[d] = narrow(from[d]);
  }

  const pdserve_attention_args& args_;
  const int heads_per_kv_;
  const int units_;    // numbers of the product in a key
  const int columns_;  // of values, padded to whole vectors
  const int group_queries_;
  const int64_t key_size_;  // of a packed tile, in floats
  const int64_t value_size_;
  const float factor_;  // scores in units of log2
};

}  // namespace

void attention(const pdserve_attention_args& args) {
  if (!args.kv_is_bf16) return Step<FloatFormat>(args).run();
#if defined(PDSERVE_IS_avx512bf16)
  Step<PairFormat>(args).run();
#else
  Step<WidenedFormat>(args).run();
#endif
}

}  // namespace pdserve::PDSERVE_LEVEL
