// out[e,r,c] = sum over the pairs of expert e, in order, of Q[pair,r] x[token,c], for many tokens. Q is made once, in
// the order of the lists: in x's type when out has it too, and otherwise as the sum of two bf16 numbers, which keep 16
// of its bits. Then a block has one expert, all ranks and kColumns columns, and walks over the expert's pairs (their
// rows of x are gathered) with kStages tiles of kPairs under way. Blocks that start together have the same columns, so
// that a token of several experts is found in the cache.
//
// A sum has one owner and a fixed order; pairs beyond the list are zeros on both sides, so that no other token's NaN
// comes in. The list of an expert is never divided among blocks: with every pair at one expert there are only as many
// blocks as spans of columns.
#include "lora_mma.cuh"

namespace moerge::cuda {

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kColumns = 128, kPairs = 32;
constexpr int kRowStride = kColumns + kPad;
constexpr int kChunks = kColumns / 8;               // copies per row of x
constexpr int kRows = kPairs * kChunks / kThreads;  // rows of a tile that one thread copies a chunk of
constexpr int kRowStep = kThreads / kChunks;

// left [pairs, parts * ranks]: Q of the listed pairs, each part what the parts before it leave; zeros beyond R. One
// thread per pair and rank.
template <class T>
struct LoraOuterLeft {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr const char* kName = "lora_outer_left";
  Lora p;
  Groups g;
  const float* q;
  int64_t ranks, parts;
  T* left;

  MOERGE_DEVICE void operator()() const {
    const int64_t index = block_x() * kThreads + thread(), i = index / ranks, r = index % ranks;
    if (i >= g.offsets[p.E]) return;
    const int64_t t = g.order[i] / p.K, k = g.order[i] % p.K;
    float rest = r < p.R ? Slots<float>(p, t).hidden(q + t * p.K * p.R, k, r) : 0;
    for (int part = 0; part < parts; ++part) {
      T value;
      from_float(rest, value);
      left[(i * parts + part) * ranks + r] = value;
      rest -= to_float(value);
    }
  }
};

// Elements i (even) and i + 1, in one access where both fit into a word.
template <class T>
MOERGE_DEVICE void store_pair(void* to, int64_t i, float low, float high) {
  *reinterpret_cast<uint32_t*>(static_cast<T*>(to) + i) = pack<T>(low, high);
}
MOERGE_DEVICE void store_pair_as(void* to, DType dtype, int64_t i, float low, float high) {
  if (dtype == DType::bf16)
    store_pair<bf16>(to, i, low, high);
  else if (dtype == DType::f16)
    store_pair<f16>(to, i, low, high);
  else
    static_cast<float*>(to)[i] = low, static_cast<float*>(to)[i + 1] = high;
}

template <class T, int ranks, int parts>
struct LoraOuterMma {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr int kLeastBlocks = ranks * parts <= 128 ? 2 : 1;
  static constexpr const char* kName = "lora_outer_mma";
  static constexpr int kWidth = parts * ranks, kLeftStride = kWidth + kPad;
  static constexpr int kStages = kWidth <= 128 ? 4 : 3;
  static constexpr int kRankWarps = ranks >= 64 ? 2 : 1, kColumnWarps = kWarps / kRankWarps;
  static constexpr int kWarpRanks = ranks / kRankWarps, kWarpColumns = kColumns / kColumnWarps;
  static constexpr size_t kShared =
      shared_size(kStages * kPairs * kRowStride * 2) + shared_size(kStages * kPairs * kLeftStride * 2);
  static_assert(kShared <= kMostShared);
  Groups g;
  int64_t K, R;
  const T* left;
  Matrix x;
  int64_t columns;
  void* out;
  DType dtype;

  struct Memory {
    T* rows;   // [kStages, kPairs, kRowStride] of x
    T* lefts;  // [kStages, kPairs, kLeftStride]
  };

  // The tokens of the next tile whose rows this thread copies: kRowStep apart; -1: none.
  struct Tokens {
    int32_t id[kRows];
  };

  MOERGE_DEVICE Tokens tokens_from(int32_t first, int32_t end) const {
    Tokens tokens;
    for (int j = 0; j < kRows; ++j) {
      const int32_t i = first + thread() / kChunks + kRowStep * j;
      tokens.id[j] = i < end ? g.order[i] / static_cast<int32_t>(K) : -1;
    }
    return tokens;
  }

  // Starts the copy of the tile of the pairs from `first`, and finds the tokens of the one behind it.
  MOERGE_DEVICE void copy_stage(const Memory& m, int stage, int32_t first, int32_t end, Tokens& tokens) const {
    if (first < end) {
      const int64_t column = block_y() * kColumns + thread() % kChunks * 8;
      for (int j = 0; j < kRows; ++j) {
        const bool valid = tokens.id[j] >= 0 && column < columns;
        const T* from = static_cast<const T*>(x.data) + (valid ? tokens.id[j] * x.stride + column : 0);
        const int row = stage * kPairs + thread() / kChunks + kRowStep * j;
        async_copy16(m.rows + row * kRowStride + thread() % kChunks * 8, from, valid);
      }
      for (int i = thread(); i < kPairs * kWidth / 8; i += kThreads) {
        const int row = i / (kWidth / 8), chunk = i % (kWidth / 8) * 8;
        const bool valid = first + row < end;
        const T* from = left + (valid ? int64_t(first + row) * kWidth + chunk : 0);
        async_copy16(m.lefts + (stage * kPairs + row) * kLeftStride + chunk, from, valid);
      }
      tokens = tokens_from(first + kPairs, end);
    }
    async_commit();  // an empty group at the end keeps the count right
  }

  using Sums = float[kWarpRanks / 16][kWarpColumns / 8][4];

  MOERGE_DEVICE static int first_rank() { return warp() / kColumnWarps * kWarpRanks; }
  MOERGE_DEVICE static int first_column() { return warp() % kColumnWarps * kWarpColumns; }

  // Tensor cores round every sum toward zero, which adds up: where float32 is kept they do not make the long one.
  MOERGE_DEVICE static void add(float (&sum)[4], const uint32_t (&a)[parts][4], const uint32_t (&b)[2]) {
    if constexpr (parts == 1) {
      mma<T>(sum, a[0], b);
    } else {
      float product[4] = {};
      for (int part = parts - 1; part >= 0; --part) mma<T>(product, a[part], b);
      for (int j = 0; j < 4; ++j) sum[j] += product[j];
    }
  }

  MOERGE_DEVICE void multiply(const T* rows, const T* lefts, Sums& sum) const {
    const int pair = lane() / 16 * 8 + lane() % 8, rank = first_rank() + lane() / 8 % 2 * 8;
    for (int k = 0; k < kPairs; k += 16) {
      uint32_t b[kWarpColumns / 16][4];
      for (int n = 0; n < kWarpColumns / 16; ++n) load_right<false>(b[n], rows, kRowStride, k, first_column() + n * 16);
      for (int i = 0; i < kWarpRanks / 16; ++i) {
        uint32_t a[parts][4];
        for (int part = 0; part < parts; ++part)
          load_matrices<true>(a[part], lefts + (k + pair) * kLeftStride + part * ranks + rank + i * 16);
        for (int n = 0; n < kWarpColumns / 16; ++n) {
          add(sum[i][2 * n], a, {b[n][0], b[n][1]});
          add(sum[i][2 * n + 1], a, {b[n][2], b[n][3]});
        }
      }
    }
  }

  MOERGE_DEVICE void write(int64_t expert, const Sums& sum) const {
    for (int i = 0; i < kWarpRanks / 16; ++i)
      for (int n = 0; n < kWarpColumns / 8; ++n)
        for (int half = 0; half < 2; ++half) {
          const int64_t r = first_rank() + i * 16 + half * 8 + lane() / 4;
          const int64_t c = block_y() * kColumns + first_column() + n * 8 + lane() % 4 * 2;
          if (r < R && c < columns)
            store_pair_as(out, dtype, (expert * R + r) * columns + c, sum[i][n][2 * half], sum[i][n][2 * half + 1]);
        }
  }

  MOERGE_DEVICE void operator()() const {
    Shared shared;
    Memory m;
    m.rows = shared.take<T>(kStages * kPairs * kRowStride);
    m.lefts = shared.take<T>(kStages * kPairs * kLeftStride);
    const int64_t expert = block_x();
    const int32_t begin = g.offsets[expert], end = g.offsets[expert + 1], tiles = (end - begin + kPairs - 1) / kPairs;
    Tokens tokens = tokens_from(begin, end);
    for (int i = 0; i < kStages - 1; ++i) copy_stage(m, i, begin + i * kPairs, end, tokens);
    Sums sum = {};
    for (int32_t tile = 0; tile < tiles; ++tile) {
      async_wait<kStages - 2>();
      sync_block();  // this tile is here, and nobody reads the one that is overwritten next
      const int32_t next = tile + kStages - 1;
      copy_stage(m, next % kStages, begin + next * kPairs, end, tokens);
      const int stage = tile % kStages;
      multiply(m.rows + stage * kPairs * kRowStride, m.lefts + stage * kPairs * kLeftStride, sum);
    }
    write(expert, sum);
  }
};

// Of how many numbers of x's type Q is the sum; 0: no number of them will do, since float16 has not float32's range.
int parts_of(DType x, DType out) {
  if (x == out) return is_16_bit(x) ? 1 : 0;
  return x == DType::bf16 ? 2 : 0;
}

struct Result {
  void* data;
  DType dtype;
};

template <class T, int ranks, int parts>
void run(const Lora& p, const Groups& g, const void* q, const Matrix& x, int64_t columns, void* workspace,
         const Result& out, Stream stream) {
  using Kernel = LoraOuterMma<T, ranks, parts>;
  T* left = static_cast<T*>(workspace);
  launch({ceil_div(p.T * p.K * ranks, kThreads)}, 0, stream,
         LoraOuterLeft<T>{p, g, static_cast<const float*>(q), ranks, parts, left});
  launch({p.E, ceil_div(columns, kColumns)}, Kernel::kShared, stream,
         Kernel{g, p.K, p.R, left, x, columns, out.data, out.dtype});
}

template <class T, int parts, class... Arguments>
void run_ranks(const Lora& p, const Arguments&... arguments) {
  switch (padded_ranks(p.R)) {
    case 16:
      return run<T, 16, parts>(p, arguments...);
    case 32:
      return run<T, 32, parts>(p, arguments...);
    case 64:
      return run<T, 64, parts>(p, arguments...);
    default:
      return run<T, 128, parts>(p, arguments...);
  }
}

}  // namespace

int64_t outer_workspace(const Lora& p, const Matrix& x, int64_t columns, DType dtype) {
  const bool fits = p.T > 0 && p.K > 0 && p.E > 0 && p.R > 0 && !p.wide && padded_ranks(p.R) && columns % 8 == 0 &&
                    aligned16(x.data, x.stride * 2);
  return fits ? p.T * p.K * padded_ranks(p.R) * parts_of(x.dtype, dtype) * 2 : 0;
}

void lora_outer_mma(const Lora& p, const Groups& groups, const void* q, const Matrix& x, int64_t columns,
                    void* workspace, void* out, DType dtype, Stream stream) {
  const Result result{out, dtype};
  if (x.dtype == DType::f16)
    run_ranks<f16, 1>(p, groups, q, x, columns, workspace, result, stream);
  else if (parts_of(x.dtype, dtype) == 1)
    run_ranks<bf16, 1>(p, groups, q, x, columns, workspace, result, stream);
  else
    run_ranks<bf16, 2>(p, groups, q, x, columns, workspace, result, stream);
}

}  // namespace moerge::cuda
