// `linear` of micro.h for one instruction set; part of micro_kernels.h.
//
// A weight from memory is read once and in order, N rows side by side, while every row of x passes over them: by tiles
// of `dot`, as many sums as the registers hold. What is asked for early is kAhead bytes behind each of these rows, and
// at their ends the first bytes of the next N: without that, one in five lines of a row of 1 to 2 KB is waited for.
//
// GB/s of one thread over matrices from memory, float32, one row of x (AVX-512; torch's sgemv 13.2, 13.3 and 15.1):
//   D x O = 576 x 576, 576 x 1536, 1536 x 576: 4 rows 11.6, 11.2, 13.6; 8 rows 12.7, 12.7, 14.6; 16 12.5, 12.6, 14.6
// The 210 layers of SmolLM2 with a branch of E = 8, ms, one thread: lines ahead in the row alone 30.4 (bfloat16) and
// 42.7 (float32), none 37.7 and 44.8, the next rows too 29.2 and 41.7. By prefetchnta, half the speed.
#pragma once

namespace moerge::cpu::MOERGE_ISA {
namespace {

// A tile of `dot`.
template <class Acc, class T>
struct Widened {
  using X = Acc;
  using W = T;
  template <int M, int N, bool fetching = false>
  static void run(int64_t D, const X* const* x, const void* const* w, Acc* const* out, int64_t n0,
                  const void* const* next = nullptr) {
    dot_tile<Acc, T, M, N, fetching>(D, x, w, out, n0, next);
  }
};

// Tiles of up to `most` rows of x and N of w. The first fetches what comes after these rows of w. Returns how many rows
// of w are done.
template <class Tile, int most, int N, class Acc>
int64_t linear_rows(int64_t M, int64_t rows, int64_t D, const typename Tile::X* const* x, const typename Tile::W* w,
                    int64_t stride, Acc* const* out) {
  const void* row[2 * N];
  int64_t n = 0;
  for (; n + N <= rows; n += N) {
    for (int64_t i = 0; i < 2 * N; ++i) row[i] = w + (n + i) * stride;
    Tile::template run<most, N, true>(D, x, row, out, n, row + N);
    int64_t m = most;
    for (; m + most <= M; m += most) Tile::template run<most, N>(D, x + m, row, out + m, n);
    if constexpr (most > 2)
      if (M - m == most - 1) Tile::template run<most - 1, N>(D, x + m, row, out + m, n), m = M;
    if constexpr (most > 3)
      if (M - m == most - 2) Tile::template run<most - 2, N>(D, x + m, row, out + m, n), m = M;
    if (m < M) Tile::template run<1, N>(D, x + m, row, out + m, n);
  }
  return n;
}

template <class Tile, class Acc>
void linear_by(int64_t M, int64_t N, int64_t D, const typename Tile::X* const* x, const void* w, int64_t stride,
               Acc* const* out) {
  constexpr bool many = kRegisters == 32;
  const auto* start = static_cast<const typename Tile::W*>(w);
  int64_t n = 0;
  if (M == 1)
    n = linear_rows<Tile, 1, many ? 8 : 4>(M, N, D, x, start, stride, out);
  else if (M == 2)
    n = linear_rows<Tile, 2, many ? 8 : 2>(M, N, D, x, start, stride, out);
  else if (M == 3 || !many)
    n = linear_rows<Tile, 3, many ? 4 : 2>(M, N, D, x, start, stride, out);
  else
    n = linear_rows<Tile, 4, 4>(M, N, D, x, start, stride, out);
  for (; n < N; ++n) {
    const void* row = start + n * stride;
    for (int64_t m = 0; m < M; ++m) Tile::template run<1, 1>(D, x + m, &row, out + m, n);
  }
}

template <class Acc, class T>
void linear(int64_t M, int64_t N, int64_t D, const Acc* const* x, const void* w, int64_t stride, Acc* const* out) {
  linear_by<Widened<Acc, T>>(M, N, D, x, w, stride, out);
}

// Null for portable code, which has not been compared with torch's product on any machine that would run it.
template <class Acc, class T>
constexpr auto few_linear() {
  using Function = decltype(&linear<Acc, T>);
  if constexpr (kVectorBytes < 32 || __is_same(Acc, double))
    return Function{nullptr};
  else
    return Function{&linear<Acc, T>};
}

}  // namespace
}  // namespace moerge::cpu::MOERGE_ISA
