// Rows times packed weights, compiled once for each level.
//
// Every output is one chain of additions over the inputs in their order, made by one kind of
// instruction (`Lanes::add`), whatever rows and columns share its register tile, whatever thread
// runs it and however many rows the call has. So a row's result is the same bits in any batch.
//
// A panel's tiles follow one another while the panel is in the cache; meanwhile the next panel is
// fetched from memory, a few lines at a time, so that few rows run at the memory's rate. Sums that
// are put down in memory and taken up again are the same sums.
#include "linear.hpp"

#include <algorithm>
#include <cstring>

#include "linear_lanes.hpp"

namespace pdserve {
namespace PDSERVE_LEVEL {
namespace {

constexpr int kLine = 64;
#if defined(PDSERVE_IS_avx512bf16)
constexpr int kDirectRows = 8;     // int8 is expanded to bf16 first for more rows than these
#endif
constexpr int64_t kExpandedInputs = 256;  // 24 KB of a panel in bf16
constexpr int kBurst = 4;          // steps between two bursts of prefetches
constexpr int64_t kAhead = 8192;   // bytes that a panel read only once is fetched ahead

// What a tile fetches for later: `lines` cache lines in each burst, from `at` on.
struct Fetch {
  const char* at;
  int64_t lines;
};

// Spreads the fetching of `num_lines` over the bursts of `num_tiles` tiles.
class Schedule {
 public:
  Schedule(int64_t num_lines, int64_t num_tiles, int64_t num_steps)
      : num_lines_(num_lines), bursts_(std::max<int64_t>(1, num_steps / kBurst)) {
    const int64_t all = num_tiles * bursts_;
    lines_ = (num_lines + all - 1) / all;
  }
  Fetch of(int64_t tile, const void* from) const {
    const int64_t fetched = tile * bursts_ * lines_;
    return {static_cast<const char*>(from) + fetched * kLine, fetched < num_lines_ ? lines_ : 0};
  }

 private:
  int64_t num_lines_, bursts_, lines_;
};

template <class Lanes>
int64_t tiles_of(int64_t num_rows) {
  return (num_rows + Lanes::kRows - 1) / Lanes::kRows;
}

// sums[row][kPanel] = rows @ panel, for R rows and the whole panel, V vectors at a time; `more` goes
// on from the sums of the inputs before.
template <class Lanes, int R>
void tile(const typename Lanes::Row* rows, int64_t stride, const typename Lanes::Element* panel,
          int64_t num_steps, float* sums, bool more, Fetch fetch) {
  constexpr int V = Lanes::columns(R), kGroup = V * Lanes::kWidth;
  static_assert(kPanel % kGroup == 0, "a panel is whole groups of vectors");
  for (int first = 0; first < kPanel; first += kGroup, fetch.lines = 0) {
    typename Lanes::Sum sum[R][V];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v)
        sum[r][v] = more ? Lanes::read(sums + r * kPanel + first + v * Lanes::kWidth) : Lanes::zero();
    const auto take = [&](int64_t step) {
      const auto* from = panel + (step * kPanel + first) * Lanes::kStep;
      if constexpr (Lanes::kByColumn) {
        for (int v = 0; v < V; ++v) {
          const auto weight = Lanes::load(from + v * Lanes::kWidth * Lanes::kStep);
          const auto* at = rows + step * Lanes::kStep;
          asm("" : "+r"(at));  // inputs are read again, not kept in registers
          for (int r = 0; r < R; ++r)
            sum[r][v] = Lanes::add(sum[r][v], weight, Lanes::broadcast(at + r * stride));
        }
        return;
      }
      typename Lanes::Weight weight[V];
      for (int v = 0; v < V; ++v)
        weight[v] = Lanes::load(from + v * Lanes::kWidth * Lanes::kStep);
      for (int r = 0; r < R; ++r) {
        const auto input = Lanes::broadcast(rows + r * stride + step * Lanes::kStep);
        for (int v = 0; v < V; ++v) sum[r][v] = Lanes::add(sum[r][v], weight[v], input);
      }
    };
    int64_t step = 0;
    for (; step + kBurst <= num_steps; step += kBurst) {
      for (int64_t line = 0; line < fetch.lines; ++line, fetch.at += kLine)
        __builtin_prefetch(fetch.at, 0, 3);
      for (int i = 0; i < kBurst; ++i) take(step + i);
    }
    for (; step < num_steps; ++step) take(step);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v)
        Lanes::store(sums + r * kPanel + first + v * Lanes::kWidth, sum[r][v]);
  }
}

template <class Lanes>
void tile_of(int num_rows, const typename Lanes::Row* rows, int64_t stride,
             const typename Lanes::Element* panel, int64_t num_steps, float* sums, bool more,
             Fetch fetch) {
  switch (num_rows) {
#define PDSERVE_TILE(R)                                                          \
  case R:                                                                        \
    if constexpr (R <= Lanes::kRows)                                             \
      tile<Lanes, R>(rows, stride, panel, num_steps, sums, more, fetch);         \
    return
    PDSERVE_TILE(1);
    PDSERVE_TILE(2);
    PDSERVE_TILE(3);
    PDSERVE_TILE(4);
    PDSERVE_TILE(5);
    PDSERVE_TILE(6);
    PDSERVE_TILE(7);
    PDSERVE_TILE(8);
#undef PDSERVE_TILE
    default:
      return;
  }
}

inline uint16_t bf16_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? (bits >> 16) | 0x40u : rounded);
}

inline float fp32_of(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

// a * b + c, rounded once where the level can.
inline float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// e to the power of x, to about an ulp: 2^n by its bits, times a polynomial on [-ln2/2, ln2/2]
// (the first terms of its Taylor series).
inline float exponential(float x) {
  x = std::min(std::max(x, -87.0f), 88.0f);
  const float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  const float n = fused(x, 1.44269504f, kRound) - kRound;
  const float r = fused(n, 2.12194440e-4f, fused(n, -0.693359375f, x));
  float p = fused(1.9841270e-4f, r, 1.3888889e-3f);
  p = fused(p, r, 8.3333333e-3f);
  p = fused(p, r, 4.1666667e-2f);
  p = fused(p, r, 1.6666667e-1f);
  p = fused(p, r, 0.5f);
  p = fused(fused(p, r, 1.0f), r, 1.0f);
  return p * float_of(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
}

// Columns [0, kWidth) of one row of a panel into the output, added to what is there if `add`.
template <int kWidth>
void put(const float* values, bool add, float* out) {
  for (int c = 0; c < kWidth; ++c) out[c] = add ? values[c] + out[c] : values[c];
}

template <int kWidth>
void put(const float* values, bool add, uint16_t* out) {
  for (int c = 0; c < kWidth; ++c) out[c] = bf16_of(add ? values[c] + fp32_of(out[c]) : values[c]);
}

template <int kWidth, class Out>
void put_part(const float* values, bool add, int64_t count, Out* out) {
  if (count == kWidth) return put<kWidth>(values, add, out);
  Out all[kWidth] = {};  // the last panel: by way of a whole one, so that the code is the same
  std::memcpy(all, out, static_cast<size_t>(count) * sizeof(Out));
  put<kWidth>(values, add, all);
  std::memcpy(out, all, static_cast<size_t>(count) * sizeof(Out));
}

// One row of a panel from its sums to the output. Each loop is as long as a
// panel, and each column of it is computed by itself, without contraction: bits do not depend on
// how the compiler makes vectors of it.
template <int kWidth, class Out>
void finish_row(const LinearCall& call, const float* sums, int64_t row, int64_t panel, Out* out,
                const Out* residual) {
  alignas(64) float values[kPanel];
  for (int c = 0; c < kPanel; ++c) values[c] = sums[c];
  if (call.scale != nullptr)
    for (int c = 0; c < kPanel; ++c) values[c] *= call.scale[panel * kPanel + c];
  if (call.bias != nullptr)
    for (int c = 0; c < kPanel; ++c) values[c] += call.bias[panel * kPanel + c];
  if (kWidth < kPanel)
    for (int c = 0; c < kPanel / 2; ++c)
      values[c] = values[c] / (1.0f + exponential(-values[c])) * values[c + kPanel / 2];
  const int64_t first = panel * kWidth;
  const int64_t count = std::min<int64_t>(kWidth, call.num_out - first);
  const int64_t at = row * call.num_out + first;
  const bool add = call.epilogue == kAdd;
  if (add && residual != out)
    std::memcpy(out + at, residual + at, static_cast<size_t>(count) * sizeof(Out));
  put_part<kWidth>(values, add, count, out + at);
}

template <class Out>
void finish_as(const LinearCall& call, const float* sums, int64_t first, int64_t num_rows,
               int64_t panel) {
  auto* out = static_cast<Out*>(call.out);
  const auto* residual = static_cast<const Out*>(call.residual);
  for (int64_t r = 0; r < num_rows; ++r, sums += kPanel) {
    if (call.epilogue == kGate)
      finish_row<kPanel / 2>(call, sums, first + r, panel, out, residual);
    else
      finish_row<kPanel>(call, sums, first + r, panel, out, residual);
  }
}

// Rows from `first` on, of one panel, from their sums to the output.
void finish(const LinearCall& call, const float* sums, int64_t first, int64_t num_rows,
            int64_t panel) {
  if (call.out_kind == kFp32)
    finish_as<float>(call, sums, first, num_rows, panel);
  else
    finish_as<uint16_t>(call, sums, first, num_rows, panel);
}

#if !defined(PDSERVE_IS_avx512bf16)
// Sixteen weights, of two steps of four columns, as bf16: eight to each step.
inline void expand16(const int8_t* from, uint16_t* first, uint16_t* second) {
#if defined(__AVX2__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  const auto high_halves = [](__m128i eight) {
    const __m256 wide = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
    return _mm256_srli_epi32(_mm256_castps_si256(wide), 16);
  };
  const __m256i packed =  // four of the first step, four of the second, and again
      _mm256_packus_epi32(high_halves(bytes), high_halves(_mm_srli_si128(bytes, 8)));
  const __m256i ordered = _mm256_permute4x64_epi64(packed, 0xD8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(first), _mm256_castsi256_si128(ordered));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(second), _mm256_extracti128_si256(ordered, 1));
#elif defined(__ARM_NEON)
  const auto high_halves = [](int16x4_t four) {
    return vshrn_n_u32(vreinterpretq_u32_f32(vcvtq_f32_s32(vmovl_s16(four))), 16);
  };
  const auto eight = [&](int8x8_t bytes) {
    const int16x8_t wide = vmovl_s8(bytes);
    return vcombine_u16(high_halves(vget_low_s16(wide)), high_halves(vget_high_s16(wide)));
  };
  vst1q_u16(first, eight(vld1_s8(from)));
  vst1q_u16(second, eight(vld1_s8(from + 8)));
#else
  for (int i = 0; i < 16; ++i) {
    const float value = from[i];
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    (i < 8 ? first : second - 8)[i] = static_cast<uint16_t>(bits >> 16);
  }
#endif
}
#endif

// Inputs of a panel of int8 as bf16: exact, so products are those of a panel that is read directly.
void expand(const int8_t* from, int64_t num_in, uint16_t* to) {
  for (int64_t step = 0; step < num_in / 4; ++step, to += 4 * kPanel) {
#if defined(PDSERVE_IS_avx512bf16)
    for (int c = 0; c < kPanel; c += 16, from += 64) {
      const auto weight = Int8Lanes::load(from);
      _mm512_storeu_si512(to + 2 * c, reinterpret_cast<__m512i>(weight.first));
      _mm512_storeu_si512(to + 2 * (kPanel + c), reinterpret_cast<__m512i>(weight.second));
    }
#else
    for (int c = 0; c < kPanel; c += 4, from += 16)
      expand16(from, to + 2 * c, to + 2 * (kPanel + c));
#endif
  }
}

// Calls `each(number, first row, rows)` for the register tiles of a part, of nearly equal height.
template <class Lanes, class Each>
void for_tiles(const LinearPart& part, Each each) {
  const int64_t num_tiles = tiles_of<Lanes>(part.num_rows);
  for (int64_t i = 0; i < num_tiles; ++i) {
    const int64_t first = part.num_rows * i / num_tiles;
    each(i, part.first_row + first,
         static_cast<int>(part.num_rows * (i + 1) / num_tiles - first));
  }
}

// Panels that products read as they lie in memory. While the tiles of one are computed, the next is
// fetched, in equal portions; a panel that is read once only is itself fetched ahead.
template <class Lanes>
void run_part(const LinearPart& part) {
  const LinearCall& call = *part.call;
  const int64_t size = call.num_in * kPanel;
  const int64_t num_steps = call.num_in / Lanes::kStep;
  const int64_t num_lines = size * static_cast<int64_t>(sizeof(typename Lanes::Element)) / kLine;
  const int64_t num_tiles = tiles_of<Lanes>(part.num_rows);
  const Schedule schedule(num_lines, num_tiles, num_steps);
  const auto* rows = static_cast<const typename Lanes::Row*>(part.rows);
  const auto* panel = static_cast<const typename Lanes::Element*>(call.weight);
  panel += part.first_panel * size;
  alignas(64) float sums[kTileRows * kPanel];
  for (int64_t i = 0; i < part.num_panels; ++i, panel += size) {
    for_tiles<Lanes>(part, [&](int64_t number, int64_t first, int count) {
      Fetch fetch = schedule.of(number, panel + size);
      if (num_tiles == 1) fetch.at = reinterpret_cast<const char*>(panel) + kAhead;
      tile_of<Lanes>(count, rows + first * call.num_in, call.num_in, panel, num_steps, sums, false,
                     fetch);
      finish(call, sums, first, count, part.first_panel + i);
    });
  }
}

// Panels of int8 for many rows: a piece that fits the L1 cache is expanded, all rows go over it
// while the next piece is fetched, and their sums wait for that.
void run_expanded(const LinearPart& part) {
  const LinearCall& call = *part.call;
  const auto* rows = static_cast<const uint16_t*>(part.rows);
  const auto* from = static_cast<const int8_t*>(call.weight);
  from += part.first_panel * call.num_in * kPanel;
  const int64_t num_tiles = tiles_of<Bf16Lanes>(part.num_rows);
  alignas(64) uint16_t expanded[kExpandedInputs * kPanel];
  for (int64_t i = 0; i < part.num_panels; ++i) {
    for (int64_t done = 0; done < call.num_in; done += kExpandedInputs) {
      const int64_t count = std::min(kExpandedInputs, call.num_in - done);
      expand(from, count, expanded);
      from += count * kPanel;
      const int64_t num_steps = count / Bf16Lanes::kStep;
      const Schedule schedule(count * kPanel / kLine, num_tiles, num_steps);
      for_tiles<Bf16Lanes>(part, [&](int64_t number, int64_t first, int num_rows) {
        tile_of<Bf16Lanes>(num_rows, rows + first * call.num_in + done, call.num_in, expanded,
                           num_steps, part.sums + (first - part.first_row) * kPanel, done > 0,
                           schedule.of(number, from));
      });
    }
    finish(call, part.sums, part.first_row, part.num_rows, part.first_panel + i);
  }
}

void run_int8(const LinearPart& part) {
#if defined(PDSERVE_IS_avx512bf16)
  if (part.num_rows <= kDirectRows) return run_part<Int8Lanes>(part);
#endif
  run_expanded(part);
}

}  // namespace

void linear(const LinearPart& part) {
  switch (part.call->weight_kind) {
    case kFp32:
      return run_part<Fp32Lanes>(part);
    case kBf16:
      return run_part<Bf16Lanes>(part);
    default:
      return run_int8(part);
  }
}

void narrow_rows(const float* from, int64_t count, uint16_t* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = bf16_of(from[i]);
}

}  // namespace PDSERVE_LEVEL
}  // namespace pdserve
