// Paged attention over a pool of int8 (`kv_int8.hpp`), with the online softmax and the tiles of
// attention.cpp and the same promise: a query's result depends on itself and on what it sees alone.
//
// Products are of integers and exact. A query becomes 16 bits a number, with one scale; so do the
// softmax weights of a tile, times the scales of the values. A 16-bit number is two rows of bytes, the
// high ones and the low ones, whose sums are joined. Keys and values are read where they lie, by
// decode and prefill alike: nothing is packed.
#include "attention.h"
#include "kv_int8.hpp"
#include "simd_int8.hpp"
#include "threads.hpp"

namespace pdserve::PDSERVE_LEVEL {
namespace {

constexpr int kTile = 64;
constexpr int kGroups = kTile / kInt8Group;
constexpr int kGroupRows = 24;  // query heads of a group, about: fits the L1 cache
constexpr float kQueryRange = 32512.0f;  // both bytes of a number are then signed ones
constexpr float kWeightRange = 65535.0f;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kMinusInfinity = -__builtin_inff();

// Where the 16-position groups of a tile lie.
struct Places {
  const int8_t* keys[kGroups];
  const float* key_scales[kGroups];
  int64_t to_values;  // from a group's keys to its values, and from scales to scales, in bytes

  const int8_t* values(int group) const { return keys[group] + to_values; }
  const float* value_scales(int group) const { return key_scales[group] + to_values / 4; }
};

// The two sides of attention as B of a product [row][k] x [k][column], a number being four bytes.
struct KeySide {
  const Places& places;
  PDSERVE_INLINE const int8_t* at(int k, int column) const {
    return places.keys[column / kInt8Group] + (k * kInt8Group + column % kInt8Group) * 4;
  }
  // Unsigned by adding 128, which `begin` takes off again.
  static PDSERVE_INLINE Ints read(const int8_t* p) { return flip_signs(load_ints(p)); }
  static PDSERVE_INLINE Ints dot(Ints sum, Ints row, Ints column) { return dot4(sum, column, row); }
};

struct ValueSide {
  const Places& places;
  int64_t stride;  // of four positions
  PDSERVE_INLINE const int8_t* at(int k, int column) const {
    return places.values(k / 4) + k % 4 * stride + column * 4;
  }
  static PDSERVE_INLINE Ints read(const int8_t* p) { return load_ints(p); }
  static PDSERVE_INLINE Ints dot(Ints sum, Ints row, Ints column) { return dot4(sum, row, column); }
};

// Each load also sends for the same place of the next tile.
template <int kRows, int kVecs, class Side>
PDSERVE_INLINE void product_tile(const Side& side, const Side& next, int depth, int column,
                                 const int32_t* a, int64_t a_stride, const int32_t* start,
                                 int32_t* c, int64_t c_stride) {
  Ints sums[kRows][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) sums[r][v] = splat_int(start[r]);
  }
  for (int k = 0; k < depth; ++k) {
    Ints columns[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      columns[v] = Side::read(side.at(k, column + v * kWidth));
      __builtin_prefetch(next.at(k, column + v * kWidth));
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Ints row = splat_int(a[r * a_stride + k]);
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) sums[r][v] = Side::dot(sums[r][v], row, columns[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) store_ints(c + r * c_stride + column + v * kWidth, sums[r][v]);
  }
}

// Rows come in pairs: the high bytes and the low ones.
template <int kVecs, class Side>
PDSERVE_INLINE void product_columns(const Side& side, const Side& next, int rows, int depth,
                                    int column, const int32_t* a, int64_t a_stride,
                                    const int32_t* start, int32_t* c, int64_t c_stride) {
  int r = 0;
  for (; r + 6 <= rows; r += 6) {
    product_tile<6, kVecs>(side, next, depth, column, a + r * a_stride, a_stride, start + r,
                           c + r * c_stride, c_stride);
  }
  a += r * a_stride;
  c += r * c_stride;
  if (rows - r == 4) {
    product_tile<4, kVecs>(side, next, depth, column, a, a_stride, start + r, c, c_stride);
  } else if (rows - r == 2) {
    product_tile<2, kVecs>(side, next, depth, column, a, a_stride, start + r, c, c_stride);
  }
}

// C[r][column] = start[r] + the sum over k of A[r][k] * B[k][column], for the first `columns`.
template <class Side>
inline void product(const Side& side, const Side& next, int rows, int columns, int depth,
                    const int32_t* a, int64_t a_stride, const int32_t* start, int32_t* c,
                    int64_t c_stride) {
  int n = 0;
  for (; n + kColumnVecs * kWidth <= columns; n += kColumnVecs * kWidth) {
    product_columns<kColumnVecs>(side, next, rows, depth, n, a, a_stride, start, c, c_stride);
  }
  for (; n < columns; n += kWidth) {
    product_columns<1>(side, next, rows, depth, n, a, a_stride, start, c, c_stride);
  }
}

class Int8Step {
 public:
  explicit Int8Step(const pdserve_attention_args& args)
      : args_(args),
        heads_per_kv_(args.num_heads / args.num_kv_heads),
        quads_(args.head_dim / 4),
        columns_((args.head_dim + kWidth - 1) / kWidth * kWidth),
        products_(columns_ > kTile ? columns_ : kTile),
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
    const int parts = args_.num_threads > 1 && args_.num_rows < 2 * args_.num_threads ? args_.num_kv_heads : 1;
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
    int32_t* products;     // [row, high and low, column]
    int32_t* queries;      // [row, high and low, quad of dimensions]
    int32_t* weights;      // [row, high and low, quad of positions]
    int32_t* key_starts;   // [row, high and low]
    int32_t* value_starts;  // the same: zero
    float* maxima;         // [row]
    float* factors;        // [row]: a score of integers times this and the key's scale is in log2
    float* weight_steps;   // [row]: what 1 of the tile's integer weights is worth
  };

  int64_t state_size(int num_rows) const {
    return num_rows * int64_t{kTile + columns_ + kWidth + 2 * (products_ + quads_ + kTile / 4) + 7};
  }

  State state_at(float* memory, int64_t num_rows) const {
    State state;
    state.scores = memory;
    state.sums = state.scores + num_rows * kTile;
    state.weight_sums = state.sums + num_rows * columns_;
    state.products = reinterpret_cast<int32_t*>(state.weight_sums + num_rows * kWidth);
    state.queries = state.products + num_rows * 2 * products_;
    state.weights = state.queries + num_rows * 2 * quads_;
    state.key_starts = state.weights + num_rows * 2 * (kTile / 4);
    state.value_starts = state.key_starts + num_rows * 2;
    state.maxima = reinterpret_cast<float*>(state.value_starts + num_rows * 2);
    state.factors = state.maxima + num_rows;
    state.weight_steps = state.factors + num_rows;
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
      begin(row, first_head + h, first, count, state_at(memory + h * state_size(num_rows), num_rows));
    }
    const int num_visits = (position + count + kTile - 1) / kTile * num_heads;
    Places next = locate(row, first_head, 0);
    for (int visit = 0; visit < num_visits; ++visit) {
      const Places here = next;
      if (visit + 1 < num_visits) {
        next = locate(row, first_head + (visit + 1) % num_heads, (visit + 1) / num_heads);
      }
      see(state_at(memory + visit % num_heads * state_size(num_rows), num_rows), num_rows,
          position - visit / num_heads * kTile, here, next);
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
    std::memset(state.value_starts, 0, sizeof(int32_t) * num_rows * 2);
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
      std::memcpy(wide, static_cast<const float*>(args_.queries) + at, sizeof(float) * args_.head_dim);
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
  void see(const State& state, int num_rows, int position, const Places& here,
           const Places& next) const {
    const int last = position + (num_rows - 1) / heads_per_kv_ + 1;
    const int seen = last < kTile ? (last + kInt8Group - 1) / kInt8Group * kInt8Group : kTile;
    product(KeySide{here}, KeySide{next}, 2 * num_rows, seen, quads_, state.queries, quads_,
            state.key_starts, state.products, products_);
    for (int group = 0; group < kGroups; ++group) {
      __builtin_prefetch(next.key_scales[group]);
      __builtin_prefetch(next.value_scales(group));
    }
    for (int r = 0; r < num_rows; ++r) {
      weigh(state, r, position + r / heads_per_kv_ + 1, seen, here);
    }
    const int64_t stride = int64_t{4} * args_.head_dim;
    product(ValueSide{here, stride}, ValueSide{next, stride}, 2 * num_rows, columns_, seen / 4,
            state.weights, kTile / 4, state.value_starts, state.products, products_);
    for (int r = 0; r < num_rows; ++r) {
      const int32_t* const high = state.products + 2 * r * products_;
      const Vec step = splat(state.weight_steps[r]);
      float* const sums = state.sums + int64_t{r} * columns_;
      for (int d = 0; d < columns_; d += kWidth) {
        const Vec whole = to_floats(join(load_ints(high + d), load_ints(high + products_ + d)));
        store(sums + d, fma(whole, step, load(sums + d)));
      }
    }
  }

  // Products of one query head become weights. The first `visible` positions are seen by it, the
  // first `seen` were multiplied.
  PDSERVE_INLINE void weigh(const State& state, int r, int visible, int seen,
                            const Places& here) const {
    float* const scores = state.scores + r * kTile;
    const int32_t* const high = state.products + 2 * r * products_;
    const Vec factor = splat(state.factors[r]);
    for (int j = 0; j < seen; j += kWidth) {
      const Vec whole = to_floats(join(load_ints(high + j), load_ints(high + products_ + j)));
      const Vec scale = load(here.key_scales[j / kInt8Group] + j % kInt8Group);
      store(scores + j, mul(whole, mul(factor, scale)));
    }
    for (int j = visible < 0 ? 0 : visible; j < seen; ++j) scores[j] = kMinusInfinity;
    Vec highest = splat(kMinusInfinity);
    for (int j = 0; j < seen; j += kWidth) highest = max(highest, load(scores + j));
    const float top = reduce_max(highest);
    float* const maximum = state.maxima + r;
    Vec weight_sum = load(state.weight_sums + r * kWidth);
    if (!(top <= *maximum)) {
      const Vec shrink = exp2(splat(*maximum - top));
      *maximum = top;
      weight_sum = mul(weight_sum, shrink);
      float* const sums = state.sums + int64_t{r} * columns_;
      for (int d = 0; d < columns_; d += kWidth) store(sums + d, mul(load(sums + d), shrink));
    }
    const Vec shift = splat(*maximum);
    Vec largest = zero();
    for (int j = 0; j < seen; j += kWidth) {
      const Vec weight = exp2(sub(load(scores + j), shift));
      const Vec scale = load(here.value_scales(j / kInt8Group) + j % kInt8Group);
      const Vec scaled = keep_first(mul(weight, scale), visible - j);
      // The last term is zero, or no number if the value is none: then it shows in the result.
      weight_sum = fma(scaled, zero(), add(weight_sum, weight));
      largest = max(largest, scaled);
      store(scores + j, scaled);
    }
    store(state.weight_sums + r * kWidth, weight_sum);
    narrow_weights(state, r, seen, reduce_max(largest));
  }

  PDSERVE_INLINE void narrow_weights(const State& state, int r, int seen, float largest) const {
    const float* const scores = state.scores + r * kTile;
    const Vec inverse = splat(largest > kSmallest ? kWeightRange / largest : 0.0f);
    state.weight_steps[r] = largest / kWeightRange;
    auto* const high = reinterpret_cast<uint8_t*>(state.weights + 2 * r * (kTile / 4));
    for (int j = 0; j < seen; j += kWidth) {
      const Ints whole = to_ints(mul(load(scores + j), inverse));
      store_bytes(high + j, high_byte(whole));
      store_bytes(high + kTile + j, whole);
    }
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
  const int products_;  // columns of either product
  const int group_queries_;
  const int64_t run_;  // bytes of a block's keys of one head
};

}  // namespace

void attention_int8(const pdserve_attention_args& args) { Int8Step(args).run(); }

}  // namespace pdserve::PDSERVE_LEVEL
