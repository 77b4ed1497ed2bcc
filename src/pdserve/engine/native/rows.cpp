// Kernels over single tokens: each row's bits depend on that row alone. Sums run lane by lane over
// the row from its start, then over the lanes in pairs; everything is computed in fp32.
#include "rows.h"

#include "kv_int8.hpp"
#include "simd_int8.hpp"
#include "threads.hpp"

namespace pdserve::PDSERVE_LEVEL {
namespace {

constexpr int64_t kItemBytes = 64 << 10;  // of input for one item of a thread's work, about

PDSERVE_INLINE Vec read(const float* p) { return load(p); }
PDSERVE_INLINE Vec read(const bf16* p) { return widen(p); }
PDSERVE_INLINE void write(float* p, Vec x) { store(p, x); }
PDSERVE_INLINE void write(bf16* p, Vec x) { narrow(p, x); }

// The first `count` lanes, the others zero.
template <class Element>
PDSERVE_INLINE Vec read_some(const Element* p, int64_t count) {
  Element lanes[kWidth] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
  return read(lanes);
}

template <class Element>
PDSERVE_INLINE void write_some(Element* p, int64_t count, Vec x) {
  Element lanes[kWidth];
  write(lanes, x);
  for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
}

// To the element's precision and back: a normalised row is rounded before it meets the weight.
PDSERVE_INLINE Vec through(Vec x, const float*) { return x; }
PDSERVE_INLINE Vec through(Vec x, const bf16*) {
  bf16 lanes[kWidth];
  narrow(lanes, x);
  return widen(lanes);
}

template <class Element>
PDSERVE_INLINE void norm_row(const Element* row, const Element* weight, Element* out,
                             int64_t width, float epsilon) {
  Vec squares[2] = {zero(), zero()};
  int64_t i = 0;
  for (; i + 2 * kWidth <= width; i += 2 * kWidth) {
    const Vec a = read(row + i), b = read(row + i + kWidth);
    squares[0] = fma(a, a, squares[0]);
    squares[1] = fma(b, b, squares[1]);
  }
  for (; i < width; i += kWidth) {
    const int64_t left = width - i;
    const Vec a = left >= kWidth ? read(row + i) : read_some(row + i, left);
    squares[0] = fma(a, a, squares[0]);
  }
  const float mean = reduce_add(add(squares[0], squares[1])) / static_cast<float>(width);
  const Vec scale = splat(1.0f / __builtin_sqrtf(mean + epsilon));
  for (i = 0; i + kWidth <= width; i += kWidth) {
    const Vec normal = through(mul(read(row + i), scale), row);
    write(out + i, mul(normal, read(weight + i)));
  }
  if (i < width) {
    const Vec normal = through(mul(read_some(row + i, width - i), scale), row);
    write_some(out + i, width - i, mul(normal, read_some(weight + i, width - i)));
  }
}

template <class Element>
void norm_rows(const pdserve_norm_args& args) {
  const int64_t bytes = args.width * static_cast<int64_t>(sizeof(Element));
  const int64_t share = bytes < kItemBytes ? kItemBytes / bytes : 1;
  auto item = [&](int64_t index, int) {
    const int64_t end = (index + 1) * share < args.num_rows ? (index + 1) * share : args.num_rows;
    for (int64_t r = index * share; r < end; ++r) {
      norm_row(static_cast<const Element*>(args.rows) + r * args.width,
               static_cast<const Element*>(args.weight),
               static_cast<Element*>(args.out) + r * args.width, args.width, args.epsilon);
    }
  };
  parallel_for(args.num_threads, (args.num_rows + share - 1) / share, item);
}

// Dimension i turns with i + half (arXiv:2104.09864, in the convention of Hugging Face's weights).
template <class Element>
PDSERVE_INLINE void rotate(const Element* from, const float* cosines, const float* sines, int half,
                           Element* to) {
  int i = 0;
  for (; i + kWidth <= half; i += kWidth) {
    const Vec a = read(from + i), b = read(from + half + i);
    const Vec c = load(cosines + i), s = load(sines + i);
    const Vec first = sub(mul(a, c), mul(b, s)), second = add(mul(b, c), mul(a, s));
    write(to + i, first);
    write(to + half + i, second);
  }
  if (i == half) return;
  const Vec a = read_some(from + i, half - i), b = read_some(from + half + i, half - i);
  const Vec c = read_some(cosines + i, half - i), s = read_some(sines + i, half - i);
  const Vec first = sub(mul(a, c), mul(b, s)), second = add(mul(b, c), mul(a, s));
  write_some(to + i, half - i, first);
  write_some(to + half + i, half - i, second);
}

// A query or key as attention wants it; `to` may be `from`.
template <class Element>
PDSERVE_INLINE void place_head(const pdserve_place_args& args, const void* norm,
                               const Element* from, const float* cosines, const float* sines,
                               Element* to) {
  const int head_dim = args.head_dim, rotary_dim = args.layer.rotates ? args.rotary_dim : 0;
  if (norm != nullptr) {
    norm_row(from, static_cast<const Element*>(norm), to, head_dim, args.epsilon);
    from = to;
  }
  if (rotary_dim != 0) rotate(from, cosines, sines, rotary_dim / 2, to);
  if (from == to || rotary_dim == head_dim) return;
  std::memcpy(to + rotary_dim, from + rotary_dim, sizeof(Element) * (head_dim - rotary_dim));
}

// A key or value as int8 with one scale; `numbers` has room for a vector more.
template <class Element>
PDSERVE_INLINE void narrow_to_int8(const Element* row, int head_dim, int8_t* numbers, float* scale) {
  float wide[kMostHeadDim + kWidth] = {};
  int d = 0;
  for (; d + kWidth <= head_dim; d += kWidth) store(wide + d, read(row + d));
  if (d < head_dim) store(wide + d, read_some(row + d, head_dim - d));
  const float range = range_of(wide, head_dim);
  *scale = range / kInt8Range;
  std::memset(numbers, 0, head_dim);
  if (!(range > kSmallest)) return;
  const Vec inverse = splat(kInt8Range / range);
  for (d = 0; d < head_dim; d += kWidth) {
    store_bytes(numbers + d, to_ints(mul(load(wide + d), inverse)));
  }
}

// The key heads from `head` on and the value heads behind them, into one slot of a block.
template <class Element>
void place_int8(const pdserve_place_args& args, const Element* head, int64_t block, int offset,
                const float* cosines, const float* sines) {
  const int head_dim = args.head_dim;
  const int64_t run = int8_run(args.block_size, head_dim);
  auto* at = static_cast<int8_t*>(args.kv) + block * 2 * args.num_kv_heads * run;
  Element rotated[kMostHeadDim];
  int8_t numbers[kMostHeadDim + kWidth];
  for (int h = 0; h < 2 * args.num_kv_heads; ++h, head += head_dim, at += run) {
    const bool is_key = h < args.num_kv_heads;
    if (is_key) place_head(args, args.layer.key_norm, head, cosines, sines, rotated);
    float scale;
    narrow_to_int8(is_key ? rotated : head, head_dim, numbers, &scale);
    std::memcpy(at + int8_numbers(args.block_size, head_dim) + offset * 4, &scale, 4);
    if (is_key) {
      int8_t* const group = at + offset / kInt8Group * kInt8Group * head_dim;
      for (int d = 0; d < head_dim; d += 4) {
        std::memcpy(group + d * kInt8Group + offset % kInt8Group * 4, numbers + d, 4);
      }
    } else {
      int8_t* const quad = at + offset / 4 * 4 * head_dim + offset % 4;
      for (int d = 0; d < head_dim; ++d) quad[d * 4] = numbers[d];
    }
  }
}

template <class Element>
void place_token(const pdserve_place_args& args, const pdserve_row& row, int index) {
  const int half = args.rotary_dim / 2, position = row.start + index;
  const float* const cosines = args.cosines + int64_t{position} * half;
  const float* const sines = args.sines + int64_t{position} * half;
  const int64_t num_all = args.num_heads + 2 * int64_t{args.num_kv_heads};
  auto* head = static_cast<Element*>(args.heads) + (row.first + index) * num_all * args.head_dim;
  for (int h = 0; h < args.num_heads; ++h, head += args.head_dim) {
    place_head(args, args.layer.query_norm, head, cosines, sines, head);
  }
  const int64_t block = args.tables[row.first_block + position / args.block_size];
  if (args.kv_is_int8) {
    return place_int8(args, head, block, position % args.block_size, cosines, sines);
  }
  const int64_t run = int64_t{args.block_size} * args.head_dim;
  auto* slot = static_cast<Element*>(args.kv) + block * 2 * args.num_kv_heads * run +
               position % args.block_size * int64_t{args.head_dim};
  for (int h = 0; h < args.num_kv_heads; ++h, head += args.head_dim, slot += run) {
    place_head(args, args.layer.key_norm, head, cosines, sines, slot);
  }
  for (int h = 0; h < args.num_kv_heads; ++h, head += args.head_dim, slot += run) {
    std::memcpy(slot, head, sizeof(Element) * args.head_dim);
  }
}

template <class Element>
void place_tokens(const pdserve_place_args& args) {
  constexpr int kShare = 32;  // tokens of a long row in one item
  constexpr int kFew = 4;     // so many are worth an item if rows are short
  int num_short = 0;
  for (int r = 0; r < args.num_rows; ++r) {
    const pdserve_row& row = args.rows[r];
    if (row.num_tokens <= kFew) {
      ++num_short;
      continue;
    }
    auto item = [&](int64_t index, int) {
      const int first = static_cast<int>(index) * kShare;
      const int end = first + kShare < row.num_tokens ? first + kShare : row.num_tokens;
      for (int i = first; i < end; ++i) place_token<Element>(args, row, i);
    };
    parallel_for(args.num_threads, (row.num_tokens + kShare - 1) / kShare, item);
  }
  if (num_short == 0) return;
  auto item = [&](int64_t index, int) {
    const int64_t first = index * kFew;
    for (int64_t r = first; r < first + kFew && r < args.num_rows; ++r) {
      const pdserve_row& row = args.rows[r];
      for (int i = 0; row.num_tokens <= kFew && i < row.num_tokens; ++i) {
        place_token<Element>(args, row, i);
      }
    }
  };
  parallel_for(args.num_threads, (args.num_rows + kFew - 1) / kFew, item);
}

// The greatest of `count` numbers, four vectors at a time; what is not a number is left out.
// `doubt` is not a number afterwards if one of them is not, or is infinite.
PDSERVE_INLINE float greatest(const float* row, int64_t count, Vec* doubt) {
  Vec most[4] = {splat(row[0]), splat(row[0]), splat(row[0]), splat(row[0])};
  int64_t i = 0;
  for (; i + 4 * kWidth <= count; i += 4 * kWidth) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const Vec x = load(row + i + v * kWidth);
      most[v] = max(x, most[v]);
      *doubt = fma(x, zero(), *doubt);
    }
  }
  float found = reduce_max(max(max(most[0], most[1]), max(most[2], most[3])));
  for (; i < count; ++i) {
    if (row[i] > found) found = row[i];
    *doubt = fma(splat(row[i]), zero(), *doubt);
  }
  return found;
}

// Looks at a row once from memory, and again only at the part that has the greatest value.
inline int64_t best_of(const float* row, int64_t width) {
  constexpr int64_t kPart = 1024;
  Vec doubt = zero();
  float found = 0.0f;
  int64_t at = -1;
  for (int64_t first = 0; first < width; first += kPart) {
    const int64_t count = width - first < kPart ? width - first : kPart;
    const float here = greatest(row + first, count, &doubt);
    if (at < 0 || here > found) found = here, at = first;
  }
  if (const float sum = reduce_add(doubt); sum != sum) {
    for (int64_t i = 0; i < width; ++i) {
      if (row[i] != row[i]) return i;
    }
  }
  while (row[at] != found) ++at;
  return at;
}

}  // namespace

void best(const pdserve_best_args& args) {
  auto item = [&](int64_t r, int) { args.out[r] = best_of(args.rows + r * args.width, args.width); };
  parallel_for(args.num_threads, args.num_rows, item);
}

void norm(const pdserve_norm_args& args) {
  args.is_bf16 ? norm_rows<bf16>(args) : norm_rows<float>(args);
}

void place(const pdserve_place_args& args) {
  args.is_bf16 ? place_tokens<bf16>(args) : place_tokens<float>(args);
}

}  // namespace pdserve::PDSERVE_LEVEL
