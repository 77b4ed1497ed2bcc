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
    const int parts = args_.num_threads > 1 && args_.num_rows < 2 * args_.num_threads ? args_.num_kv_heads : 1;
    const int heads = args_.num_kv_heads / parts;
    auto item = [&](int64_t index, int) {
      const pdserve_row& row = args_.rows[index / parts];
      if (row.num_tokens > group_queries_) return;
      attend_short(row, static_cast<int>(index % parts) * heads, heads);
    };
    parallel_for(args_.num_threads, int64_t{args_.num_rows} * parts, item);
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
        const auto rows = locate(row, head + static_cast<int>(index / num_tiles), tile);
        float* const keys = packed + index * tile_size;
        pack_tile<Format, false>(rows, rows, args_.head_dim, columns_, keys, keys + key_size_);
      };
      parallel_for(args_.num_threads, int64_t{count} * num_tiles, pack_item);
      auto attend_item = [&](int64_t index, int) {
        const int which = static_cast<int>(index / num_groups);
        const int group = num_groups - 1 - static_cast<int>(index % num_groups);
        const int first = group * group_queries_;
        const int rest = row.num_tokens - first;
        attend_packed(row, head + which, first, rest < group_queries_ ? rest : group_queries_,
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

  // Query rows of one kv head and what has been made of them.
  struct State {
    float* scores;       // [row, 64]: of one tile, then the weights
    float* sums;         // [row, columns]: weighted values
    float* queries;      // [row, unit]
    float* weight_sums;  // [row, lane]
    float* maxima;       // [row]
  };

  int64_t state_size(int num_rows) const {
    return num_rows * int64_t{kTile + columns_ + units_ + kWidth + 1};
  }

  State state_at(float* memory, int64_t num_rows) const {
    State state;
    state.scores = memory;
    state.sums = state.scores + num_rows * kTile;
    state.queries = state.sums + num_rows * columns_;
    state.weight_sums = state.queries + num_rows * units_;
    state.maxima = state.weight_sums + num_rows * kWidth;
    return state;
  }

  State begin(const pdserve_row& row, int kv_head, int first, int count, float* memory) const {
    const int64_t num_rows = int64_t{count} * heads_per_kv_;
    const State state = state_at(memory, num_rows);
    load_queries(row, kv_head, first, count, state.queries);
    std::memset(state.sums, 0, sizeof(float) * num_rows * columns_);
    std::memset(state.weight_sums, 0, sizeof(float) * num_rows * kWidth);
    for (int r = 0; r < num_rows; ++r) state.maxima[r] = kMinusInfinity;
    return state;
  }

  // Add one tile to what `num_rows` query rows have seen; the first is at `position`. Positions that
  // no query sees are left out of the products: their weights are 0, which changes no bit.
  template <class Fetch>
  void see(const State& state, int num_rows, int position, int tile, const float* keys,
           const Fetch& ahead_keys, const Fetch& ahead_values) const {
    const int last = position + (num_rows - 1) / heads_per_kv_ + 1 - tile * kTile;
    const int seen = last < kTile ? (last + kWidth - 1) / kWidth * kWidth : kTile;
    product<typename Format::Kind, false>(ahead_keys, num_rows, seen, units_, state.queries, units_,
                                          keys, kTile, state.scores, kTile);
    for (int r = 0; r < num_rows; ++r) {
      const int visible = position + r / heads_per_kv_ + 1 - tile * kTile;
      weigh(state.scores + r * kTile, visible, state.maxima + r, state.weight_sums + r * kWidth,
            state.sums + int64_t{r} * columns_);
    }
    const int depth = (seen + Format::kUnit - 1) / Format::kUnit;
    product<typename Format::Kind, true>(ahead_values, num_rows, columns_, depth, state.scores,
                                         kTile, keys + key_size_, columns_, state.sums, columns_);
  }

  void finish(const State& state, const pdserve_row& row, int kv_head, int first, int count) const {
    for (int r = 0; r < count * heads_per_kv_; ++r) {
      const Vec sum = splat(reduce_add(load(state.weight_sums + r * kWidth)));
      float* const sums = state.sums + int64_t{r} * columns_;
      for (int d = 0; d < columns_; d += kWidth) store(sums + d, div(load(sums + d), sum));
      store_result(row, kv_head, first, r, sums);
    }
  }

  // `count` queries of a row, from its `first` on, for one kv head whose tiles are packed.
  void attend_packed(const pdserve_row& row, int kv_head, int first, int count,
                     const float* packed) const {
    const int num_rows = count * heads_per_kv_;
    auto* const memory = static_cast<float*>(scratch(1, 4 * state_size(num_rows)));
    const State state = begin(row, kv_head, first, count, memory);
    const int position = row.start + first;
    const int num_tiles = tiles(position + count);
    for (int tile = 0; tile < num_tiles; ++tile) {
      see(state, num_rows, position, tile, packed + tile * (key_size_ + value_size_), Nothing{},
          Nothing{});
    }
    finish(state, row, kv_head, first, count);
  }

  // All queries of a short row, for `num_heads` kv heads: together, because their keys and values lie
  // together. The next tile is on its way from memory while one is computed.
  void attend_short(const pdserve_row& row, int first_head, int num_heads) const {
    const int num_rows = row.num_tokens * heads_per_kv_;
    const int64_t tile_size = key_size_ + value_size_;
    auto* const packed = static_cast<float*>(
        scratch(1, 4 * (tile_size + num_heads * state_size(num_rows))));
    float* const memory = packed + tile_size;
    for (int h = 0; h < num_heads; ++h) {
      begin(row, first_head + h, 0, row.num_tokens, memory + h * state_size(num_rows));
    }
    const int num_visits = tiles(row.start + row.num_tokens) * num_heads;
    TileRows<Element> next = locate(row, first_head, 0);
    for (int visit = 0; visit < num_visits; ++visit) {
      const TileRows<Element> rows = next;
      if (visit + 1 < num_visits) {
        next = locate(row, first_head + (visit + 1) % num_heads, (visit + 1) / num_heads);
      }
      pack_tile<Format, true>(rows, next, args_.head_dim, columns_, packed, packed + key_size_);
      const int64_t last = args_.head_dim * int64_t{sizeof(Element)} - 64;
      const Ahead ahead_keys{reinterpret_cast<const void* const*>(next.keys), last};
      const Ahead ahead_values{ahead_keys.rows,
                               last + next.to_values * int64_t{sizeof(Element)}};
      see(state_at(memory + visit % num_heads * state_size(num_rows), num_rows), num_rows,
          row.start, visit / num_heads, packed, ahead_keys, ahead_values);
    }
    for (int h = 0; h < num_heads; ++h) {
      finish(state_at(memory + h * state_size(num_rows), num_rows), row, first_head + h, 0,
             row.num_tokens);
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

void attention_int8(const pdserve_attention_args& args);  // attention_int8.cpp

void attention(const pdserve_attention_args& args) {
  if (args.kv_kind == kKvInt8) return attention_int8(args);
  if (args.kv_kind == kKvFloat) return Step<FloatFormat>(args).run();
#if defined(PDSERVE_IS_avx512bf16)
  Step<PairFormat>(args).run();
#else
  Step<WidenedFormat>(args).run();
#endif
}

}  // namespace pdserve::PDSERVE_LEVEL
