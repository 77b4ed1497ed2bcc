// Paged attention over a pool of int8 (`kv_int8.hpp`), with the online softmax and the tiles of
// attention.cpp and the same promise: a query's result depends on itself and on what it sees alone.
//
// Products are of integers and exact. A query becomes 16 bits a number, with one scale; so does a
// tile's softmax weight times its value's scale, as a share of what the largest of both would give. A
// 16-bit number is a pair of rows of bytes, the high ones and the low ones, whose sums are joined.
// Keys and values are read where they lie, by decode and prefill alike: nothing is packed.
#include "attention.h"
#include "product_int8.hpp"
#include "threads.hpp"

namespace pdserve::PDSERVE_LEVEL {
namespace {

constexpr int kGroupRows = 24;  // query heads of a group, about: fits the L1 cache
constexpr float kQueryRange = 32512.0f;  // both bytes of a number are then signed ones
constexpr float kWeightRange = 65535.0f;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kMinusInfinity = -__builtin_inff();

// What a tile has in common for all queries that see the whole of it.
struct Scales {
  float keys[kTile];
  float values[kTile];
  float shares[kTile];  // what a value's weight is multiplied with to become an integer
  float step;           // and what 1 of those integers is worth
};

class Int8Step {
 public:
  explicit Int8Step(const pdserve_attention_args& args)
      : args_(args),
        heads_per_kv_(args.num_heads / args.num_kv_heads),
        quads_(args.head_dim / 4),
        columns_((args.head_dim + kWidth - 1) / kWidth * kWidth),
        group_queries_(heads_per_kv_ < kGroupRows ? kGroupRows / heads_per_kv_ : 1),
        run_(int8_run(args.block_size, args.head_dim)) {}

  void run() {
    for (int r = 0; r < args_.num_rows; ++r) {
      const pdserve_row& row = args_.rows[r];
      if (row.num_tokens <= group_queries_) continue;
      const int num_groups = (row.num_tokens + group_queries_ - 1) / group_queries_;
      auto item = [&](int64_t index, int) {
        const int first = (num_groups - 1 - static_cast<int>(index % num_groups)) * group_queries_;
        const int rest = row.num_tokens - first;
        attend(row, static_cast<int>(index / num_groups), 1, first,
               rest < group_queries_ ? rest : group_queries_);
      };
      parallel_for(args_.num_threads, int64_t{args_.num_kv_heads} * num_groups, item);
    }
    const bool by_head = args_.num_threads > 1 && args_.num_rows < 2 * args_.num_threads;
    const int parts = by_head ? args_.num_kv_heads : 1;
    const int heads = args_.num_kv_heads / parts;
    auto item = [&](int64_t index, int) {
      const pdserve_row& row = args_.rows[index / parts];
      if (row.num_tokens > group_queries_) return;
      attend(row, static_cast<int>(index % parts) * heads, heads, 0, row.num_tokens);
    };
    parallel_for(args_.num_threads, int64_t{args_.num_rows} * parts, item);
  }

 private:
  // Query rows of one kv head and what has been made of them.
  struct State {
    float* scores;         // [row, 64]: of one tile, then the weights
    float* sums;           // [row, columns]: weighted values
    float* weight_sums;    // [row, lane]
    int32_t* queries;      // [row, high and low, quad of dimensions]
    int32_t* weights;      // [row, high and low, quad of positions]
    int32_t* key_starts;   // [row, high and low]
    float* maxima;         // [row]
    float* factors;        // [row]: a score of integers times this and the key's scale is in log2
    float* steps;          // [row]: what 1 of a sum of the tile's values is worth
  };

  int64_t state_size(int num_rows) const {
    return num_rows * int64_t{kTile + columns_ + kWidth + 2 * (quads_ + kTile / 4) + 5};
  }

  State state_at(float* memory, int64_t num_rows) const {
    State state;
    state.scores = memory;
    state.sums = state.scores + num_rows * kTile;
    state.weight_sums = state.sums + num_rows * columns_;
    state.queries = reinterpret_cast<int32_t*>(state.weight_sums + num_rows * kWidth);
    state.weights = state.queries + num_rows * 2 * quads_;
    state.key_starts = state.weights + num_rows * 2 * (kTile / 4);
    state.maxima = reinterpret_cast<float*>(state.key_starts + num_rows * 2);
    state.factors = state.maxima + num_rows;
    state.steps = state.factors + num_rows;
    return state;
  }

  Places locate(const pdserve_row& row, int kv_head, int tile) const {
    Places found;
    found.to_values = run_ * args_.num_kv_heads;
    const auto* kv = static_cast<const int8_t*>(args_.kv) + kv_head * run_;
    const int32_t* table = args_.tables + row.first_block;
    const int end = row.start + row.num_tokens;
    for (int group = 0; group < kGroups; ++group) {
      int position = tile * kTile + group * kInt8Group;
      if (position >= end) position = tile * kTile;  // not looked at
      const int offset = position % args_.block_size;
      const int8_t* const run =
          kv + table[position / args_.block_size] * int64_t{2} * args_.num_kv_heads * run_;
      found.keys[group] = run + offset * args_.head_dim;
      found.key_scales[group] = reinterpret_cast<const float*>(
          run + int8_numbers(args_.block_size, args_.head_dim)) + offset;
    }
    return found;
  }

  // `count` queries of a row, from its `first` on, for `num_heads` kv heads: for the few queries of a
  // decode step all together, because their keys and values lie together.
  void attend(const pdserve_row& row, int first_head, int num_heads, int first, int count) const {
    const int num_rows = count * heads_per_kv_;
    const int position = row.start + first;
    auto* const memory = static_cast<float*>(scratch(1, 4 * num_heads * state_size(num_rows)));
    for (int h = 0; h < num_heads; ++h) {
      begin(row, first_head + h, first, count,
            state_at(memory + h * state_size(num_rows), num_rows));
    }
    const int num_visits = (position + count + kTile - 1) / kTile * num_heads;
    Places next = locate(row, first_head, 0);
    for (int visit = 0; visit < num_visits; ++visit) {
      const Places here = next;
      if (visit + 1 < num_visits) {
        next = locate(row, first_head + (visit + 1) % num_heads, (visit + 1) / num_heads);
      }
      const State state = state_at(memory + visit % num_heads * state_size(num_rows), num_rows);
      const int from_tile = position - visit / num_heads * kTile;
      if (row.num_tokens > group_queries_) {
        see<false>(state, num_rows, from_tile, here, next);  // other groups have just read it
      } else {
        see<true>(state, num_rows, from_tile, here, next);
      }
    }
    for (int h = 0; h < num_heads; ++h) {
      finish(row, first_head + h, first, count,
             state_at(memory + h * state_size(num_rows), num_rows));
    }
  }

  void begin(const pdserve_row& row, int kv_head, int first, int count, const State& state) const {
    const int num_rows = count * heads_per_kv_;
    std::memset(state.sums, 0, sizeof(float) * num_rows * columns_);
    std::memset(state.weight_sums, 0, sizeof(float) * num_rows * kWidth);
    for (int r = 0; r < num_rows; ++r) {
      state.maxima[r] = kMinusInfinity;
      const int64_t at = (row.first + first + r / heads_per_kv_) * args_.query_stride +
                         (int64_t{kv_head} * heads_per_kv_ + r % heads_per_kv_) * args_.head_dim;
      begin_query(at, state, r);
    }
  }

  // The query head at `at` as two rows of bytes.
  void begin_query(int64_t at, const State& state, int r) const {
    float wide[kMostHeadDim + kWidth] = {};
    if (args_.queries_are_bf16) {
      const auto* from = static_cast<const bf16*>(args_.queries) + at;
      for (int d = 0; d < args_.head_dim; ++d) wide[d] = widen(from[d]);
    } else {
      const auto* from = static_cast<const float*>(args_.queries) + at;
      std::memcpy(wide, from, sizeof(float) * args_.head_dim);
    }
    const float range = range_of(wide, args_.head_dim);
    const float inverse = range > kSmallest ? kQueryRange / range : 0.0f;
    int8_t high[kMostHeadDim + kWidth] = {}, low[kMostHeadDim + kWidth] = {};
    for (int d = 0; inverse > 0.0f && d < args_.head_dim; d += kWidth) {
      const Ints whole = to_ints(mul(load(wide + d), splat(inverse)));
      store_bytes(low + d, whole);
      store_bytes(high + d, high_byte(add(whole, splat_int(128))));
    }
    int32_t high_sum = 0, low_sum = 0;
    for (int d = 0; d < args_.head_dim; ++d) {
      high_sum += high[d];
      low_sum += low[d];
    }
    auto* const bytes = reinterpret_cast<int8_t*>(state.queries + 2 * r * quads_);
    std::memcpy(bytes, high, args_.head_dim);
    std::memcpy(bytes + args_.head_dim, low, args_.head_dim);
    state.key_starts[2 * r] = -128 * high_sum;
    state.key_starts[2 * r + 1] = -128 * low_sum;
    state.factors[r] = range / kQueryRange * (args_.scale * kLog2E);
  }

  // Add one tile to what `num_rows` query rows have seen; the first is at `position` of the tile.
  template <bool kAhead>
  void see(const State& state, int num_rows, int position, const Places& here,
           const Places& next) const {
    const int last = position + (num_rows - 1) / heads_per_kv_ + 1;
    const int seen = last < kTile ? (last + kInt8Group - 1) / kInt8Group * kInt8Group : kTile;
    Scales scales;
    for (int j = 0; j < seen; j += kWidth) {
      const int group = j / kInt8Group, in_group = j % kInt8Group;
      store(scales.keys + j, load(here.key_scales[group] + in_group));
      store(scales.values + j, load(here.value_scales(group) + in_group));
    }
    const KeySide keys{here, state.key_starts, state.factors, scales.keys, state.scores};
    const KeySide next_keys{next, nullptr, nullptr, nullptr, nullptr};
    product<kAhead>(keys, next_keys, num_rows, seen, quads_, state.queries, quads_);
    if (kAhead) {
      for (int group = 0; group < kGroups; ++group) {
        __builtin_prefetch(next.key_scales[group]);
        __builtin_prefetch(next.value_scales(group));
      }
    }
    int shared = -1;
    for (int r = 0; r < num_rows; ++r) {
      const int visible = position + r / heads_per_kv_ + 1;
      const int known = visible < 0 ? 0 : visible < kTile ? visible : kTile;
      if (known != shared) share(scales, known);
      shared = known;
      if (seen == kTile) {
        weigh(state, r, visible, kTile, scales);  // a constant: the loops are unrolled
      } else {
        weigh(state, r, visible, seen, scales);
      }
    }
    const ValueSide values(here, args_.head_dim, state.steps, state.sums, columns_);
    const ValueSide next_values(next, args_.head_dim, nullptr, nullptr, 0);
    product<kAhead>(values, next_values, num_rows, columns_, seen / 4, state.weights, kTile / 4);
  }

  // A value that is no number, or infinite, makes the step none, and with it the result.
  static PDSERVE_INLINE void share(Scales& scales, int visible) {
    const float range = range_of(scales.values, visible);
    const Vec inverse = splat(range > kSmallest ? kWeightRange / range : 0.0f);
    scales.step = range / kWeightRange;
    for (int j = 0; j < kTile; j += kWidth) {
      const Vec known = keep_first(load(scales.values + j), visible - j);
      store(scales.shares + j, mul(known, inverse));
    }
  }

  // Scores of one query head become weights, of which the tile's largest is 1. The first `visible`
  // positions are seen by it, the first `seen` have scores.
  PDSERVE_INLINE void weigh(const State& state, int r, int visible, int seen,
                            const Scales& scales) const {
    float* const scores = state.scores + r * kTile;
    for (int j = visible < 0 ? 0 : visible; j < seen; ++j) scores[j] = kMinusInfinity;
    Vec highest = load(scores);
#pragma GCC unroll 16
    for (int j = kWidth; j < seen; j += kWidth) highest = max(highest, load(scores + j));
    const float top = reduce_max(highest);
    float* const maximum = state.maxima + r;
    float* const weight_sums = state.weight_sums + r * kWidth;
    Vec part = splat(1.0f);  // of the tile's weights in those of the row
    if (!(top <= *maximum)) {
      const Vec shrink = exp2(splat(*maximum - top));
      *maximum = top;
      store(weight_sums, mul(load(weight_sums), shrink));
      float* const sums = state.sums + int64_t{r} * columns_;
      for (int d = 0; d < columns_; d += kWidth) store(sums + d, mul(load(sums + d), shrink));
    } else {
      part = exp2(splat(top - *maximum));
    }
    const Vec shift = splat(visible > 0 ? top : 0.0f);
    Vec weight_sum = zero();
    auto* const high = reinterpret_cast<uint8_t*>(state.weights + 2 * r * (kTile / 4));
#pragma GCC unroll 16
    for (int j = 0; j < seen; j += kWidth) {
      const Vec weight = exp2(sub(load(scores + j), shift));
      weight_sum = add(weight_sum, weight);
      const Ints whole = to_ints(mul(weight, load(scales.shares + j)));
      store_bytes(high + j, high_byte(whole));
      store_bytes(high + kTile + j, whole);
    }
    store(weight_sums, fma(weight_sum, part, load(weight_sums)));
    float parts[kWidth];
    store(parts, part);
    state.steps[r] = scales.step * parts[0];
  }

  void finish(const pdserve_row& row, int kv_head, int first, int count, const State& state) const {
    for (int r = 0; r < count * heads_per_kv_; ++r) {
      const Vec sum = splat(reduce_add(load(state.weight_sums + r * kWidth)));
      float* const sums = state.sums + int64_t{r} * columns_;
      for (int d = 0; d < columns_; d += kWidth) store(sums + d, div(load(sums + d), sum));
      const int64_t head = int64_t{kv_head} * heads_per_kv_ + r % heads_per_kv_;
      const int64_t at =
          (row.first + first + r / heads_per_kv_) * args_.out_stride + head * args_.head_dim;
      if (!args_.out_is_bf16) {
        std::memcpy(static_cast<float*>(args_.out) + at, sums, sizeof(float) * args_.head_dim);
        continue;
      }
      auto* const to = static_cast<bf16*>(args_.out) + at;
      int d = 0;
      for (; d + kWidth <= args_.head_dim; d += kWidth) narrow(to + d, load(sums + d));
      for (; d < args_.head_dim; ++d) to[d] = narrow(sums[d]);
    }
  }

  const pdserve_attention_args& args_;
  const int heads_per_kv_;
  const int quads_;     // of dimensions
  const int columns_;   // of values, padded to whole vectors
  const int group_queries_;
  const int64_t run_;  // bytes of a block's keys of one head
};

}  // namespace

void attention_int8(const pdserve_attention_args& args) { Int8Step(args).run(); }

}  // namespace pdserve::PDSERVE_LEVEL
