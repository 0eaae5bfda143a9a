// The kernel of route_scores_mma.cu, which says what it does and how.
#pragma once

#include "route.cuh"
#include "route_mma.cuh"

namespace moerge::cuda::scores_mma {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTokens = 32, kFeatures = 32;  // of a warp at a time
constexpr int kSamples = 4;                  // of 8 features

// Two numbers, each as three of bfloat16: part[0] holds the highest 8 bits of both, part[2] the lowest. Cut, not
// rounded, so that the three hold all 24 bits. NaN stays NaN in one of them at least.
MOERGE_DEVICE void split(float low, float high, uint32_t (&part)[3]) {
  MOERGE_UNROLL
  for (int i = 0; i < 3; ++i) {
    part[i] = high_halves(as_bits(low), as_bits(high));
    low -= as_float(as_bits(low) & 0xFFFF0000u);
    high -= as_float(as_bits(high) & 0xFFFF0000u);
  }
}

// Blocks that fit on a processor.
constexpr int blocks_together(int experts, size_t size_of_x) { return experts > 16 || size_of_x == 4 ? 1 : 2; }

template <class X, int kExperts>
struct RouteScoresMma {
  static constexpr int kThreads = scores_mma::kThreads;
  static constexpr int kLeastBlocks = blocks_together(kExperts, sizeof(X));
  static constexpr const char* kName = "route_scores_mma";
  static constexpr int kTiles = kExperts / 8;
  static constexpr int kPieces = sizeof(X) / 2;  // of 16 bytes, in 8 features
  static constexpr int kStages = kPieces == 1 ? 4 : 2;
  static constexpr int kSumStride = kExperts % 32 == 16 ? kExperts + 8 : kExperts;  // rows then lie in different banks
  static constexpr size_t kRing = kStages * 4 * kPieces * kThreads * 16;
  static constexpr size_t kSums = kWarps * kTokens * kSumStride * 4;
  static constexpr size_t kShared = shared_size(kRing > kSums ? kRing : kSums) +
                                    shared_size(kWarps * kTokens * kMoments * 4) + shared_size(kWarps * kExperts * 4);
  Route p;
  int group_bits;  // 2 to that many groups of warps: each has tokens of its own, and its warps share the features

  struct Memory {
    char* ring;              // [kStages, 4, kPieces, kThreads] pieces, and later
    float *moments, *gates;  // [kWarps, kTokens, kMoments], [kWarps, kExperts]
    MOERGE_DEVICE float* sums() const { return reinterpret_cast<float*>(ring); }  // [kWarps, kTokens, kSumStride]
  };

  // What a lane has: rows g + 8 r of the warp's tokens, and of each chunk the features 8 i to 8 i + 7.
  struct Lane {
    int64_t first;          // token of row 0
    int column, D;          // 8 i
    char* ring;             // its pieces, kThreads of 16 bytes apart
    const X* x[4];          // of a row beyond T: the last token, whose results nobody stores
    const float* gates;     // of the block's first expert, and from there on
    uint32_t gate[kTiles];  // of experts g + 8 n; of one beyond E: the last one's
    bool adds_moments, adds_gates;
    float shift[4] = {}, factor[4] = {1, 1, 1, 1}, sum[4] = {}, squares[4] = {}, gate_sum[kTiles] = {};
  };
  using Sums = float[2][kTiles][4];
  using Gates = Bytes16[kTiles][2];
  using Tokens = uint32_t[4][kPieces * 4];

  MOERGE_DEVICE int group() const { return warp() & ((1 << group_bits) - 1); }
  MOERGE_DEVICE int split_of_features() const { return warp() >> group_bits; }
  MOERGE_DEVICE int splits() const { return kWarps >> group_bits; }
  MOERGE_DEVICE bool standardizes() const { return p.normalize == Normalize::standardize; }

  MOERGE_DEVICE Lane lane_of(const Memory& m) const {
    Lane mine;
    mine.first = ((block_x() << group_bits) + group()) * kTokens;
    mine.column = lane() % 4 * 8, mine.D = static_cast<int>(p.D);
    mine.ring = m.ring + thread() * 16;
    MOERGE_UNROLL
    for (int row = 0; row < 4; ++row) {
      const int64_t t = mine.first + lane() / 4 + row * 8;
      mine.x[row] = static_cast<const X*>(p.x.data) + (t < p.T ? t : p.T - 1) * p.x.stride;
    }
    const int first = static_cast<int>(block_y()) * kExperts, last = static_cast<int>(p.E) - 1;
    mine.gates = static_cast<const float*>(p.gates.data) + first * p.gates.stride;
    MOERGE_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      const int e = first + n * 8 + lane() / 4;
      mine.gate[n] = static_cast<uint32_t>((e < last ? e : last) - first) * static_cast<uint32_t>(p.gates.stride);
    }
    mine.adds_moments = standardizes() && block_y() == 0;
    mine.adds_gates = standardizes() && block_x() == 0 && group() == 0;
    return mine;
  }

  MOERGE_DEVICE static char* piece(const Lane& mine, int stage, int row, int i) {
    return mine.ring + ((stage * 4 + row) * kPieces + i) * (kThreads * 16);
  }

  MOERGE_DEVICE static void copy_tokens(const Lane& mine, int stage, int chunk, int end) {
    if (chunk < end) {
      const int column = chunk * kFeatures + mine.column;
      const bool valid = column < mine.D;
      MOERGE_UNROLL
      for (int row = 0; row < 4; ++row) {
        MOERGE_UNROLL
        for (int i = 0; i < kPieces; ++i)
          async_copy16(piece(mine, stage, row, i), mine.x[row] + (valid ? column : 0) + i * (8 / kPieces), valid);
      }
    }
    async_commit();  // an empty group at the end keeps the count right
  }

  // Beyond D, where tokens are 0, the first features.
  MOERGE_DEVICE static Bytes16 load_gate(const Lane& mine, int chunk, int tile, int step) {
    const int column = chunk * kFeatures + mine.column;
    return load16(mine.gates + (column < mine.D ? column : 0) + mine.gate[tile] + step * 4);
  }

  // The pivot of one token: the mean of some features, unless 0 is nearer to them than they to each other. Around the
  // first, so that equal features give it exactly.
  MOERGE_DEVICE float pivot_of(int64_t t) const {
    const X* row = static_cast<const X*>(p.x.data) + (t < p.T ? t : p.T - 1) * p.x.stride;
    float x[kSamples][8], sum = 0, squares = 0;
    MOERGE_UNROLL
    for (int i = 0; i < kSamples; ++i) load_vector<X>(row, p.x.dtype, p.D / (8 * kSamples) * 8 * i, x[i]);
    const float around = x[0][0];
    MOERGE_UNROLL
    for (int i = 0; i < 8 * kSamples; ++i) sum += x[i / 8][i % 8] - around;
    const float mean = around + sum / (8 * kSamples);
    MOERGE_UNROLL
    for (int i = 0; i < 8 * kSamples; ++i) squares += (x[i / 8][i % 8] - mean) * (x[i / 8][i % 8] - mean);
    return fabs(mean) > sqrt(squares / (8 * kSamples)) ? mean : 0;  // NaN: 0, which leaves the others alone
  }

  // How the warp's tokens are normalized here. Returns whether they are taken as they are.
  MOERGE_DEVICE bool prepare(Lane& mine) const {
    const int64_t t = mine.first + lane();
    if (p.normalize == Normalize::unit) {
      MOERGE_UNROLL
      for (int row = 0; row < 4; ++row) {
        const int64_t its = mine.first + lane() / 4 + row * 8;
        mine.factor[row] = Statistics<float>::load(p.statistics, its < p.T ? its : p.T - 1).factor;
      }
      return false;
    }
    if (standardizes()) {
      const float pivot = pivot_of(t);
      MOERGE_UNROLL
      for (int row = 0; row < 4; ++row) mine.shift[row] = shuffle(pivot, lane() / 4 + row * 8);
      return ballot(pivot != 0) == 0;
    }
    if (block_y() == 0 && block_z() == 0 && split_of_features() == 0 && t < p.T)
      Statistics<float>{0, 0, 1, 0}.store(p.statistics, t);
    return true;
  }

  // Features 4 step to 4 step + 3 of the lane's 8 of one token: 0 beyond D, and without its pivot unless `plain`.
  template <bool plain>
  MOERGE_DEVICE static void values(const Lane& mine, const Tokens& token, int row, int step, bool inside,
                                   float (&x)[4]) {
    MOERGE_UNROLL
    for (int i = 0; i < 4; ++i) {
      if constexpr (kPieces == 2)
        x[i] = as_float(token[row][step * 4 + i]);
      else
        x[i] = i % 2 ? high_half<X>(token[row][step * 2 + i / 2]) : low_half<X>(token[row][step * 2 + i / 2]);
      if constexpr (!plain) x[i] = inside ? x[i] - mine.shift[row] : 0;
    }
  }

  // To the moments, of a chunk.
  template <bool plain>
  MOERGE_DEVICE static void add_moments(const Tokens& token, bool inside, Lane& mine) {
    MOERGE_UNROLL
    for (int row = 0; row < 4; ++row) {
      MOERGE_UNROLL
      for (int step = 0; step < 2; ++step) {
        float x[4];
        values<plain>(mine, token, row, step, inside, x);
        MOERGE_UNROLL
        for (int i = 0; i < 4; ++i) mine.sum[row] += x[i], mine.squares[row] += x[i] * x[i];
      }
    }
  }

  // The left fragments of rows 2 half and 2 half + 1: as they are in a[0] where `plain`, else in three parts.
  template <bool plain>
  MOERGE_DEVICE static void left(const Tokens& token, int half, int step, bool inside, const Lane& mine,
                                 uint32_t (&a)[3][4]) {
    MOERGE_UNROLL
    for (int j = 0; j < 2; ++j) {
      const int row = half * 2 + j;
      if constexpr (plain) {
        a[0][j] = token[row][step * 2], a[0][j + 2] = token[row][step * 2 + 1];
      } else {
        float x[4];
        values<plain>(mine, token, row, step, inside, x);
        MOERGE_UNROLL
        for (int pair = 0; pair < 2; ++pair) {
          uint32_t part[3];
          split(x[pair * 2] * mine.factor[row], x[pair * 2 + 1] * mine.factor[row], part);
          MOERGE_UNROLL
          for (int i = 0; i < 3; ++i) a[i][j + pair * 2] = part[i];
        }
      }
    }
  }

  template <int left_part, int right_part, int count>
  MOERGE_DEVICE static void add_product(const uint32_t (&a)[3][4], const uint32_t (&b)[count][2][3],
                                        float (&sum)[count][4]) {
    MOERGE_UNROLL
    for (int n = 0; n < count; ++n) mma<bf16>(sum[n], a[left_part], {b[n][0][right_part], b[n][1][right_part]});
  }

  MOERGE_DEVICE static float sum_of(const Bytes16& four) {
    return (as_float(four.word[0]) + as_float(four.word[1])) + (as_float(four.word[2]) + as_float(four.word[3]));
  }

  // One half of a chunk, 16 of its features and 4 of each lane, for `count` tiles of experts. The gates of the next
  // chunk take the place of these.
  template <bool plain, int first, int count>
  MOERGE_DEVICE static void multiply(const Tokens& token, Gates& gates, int step, bool inside, int next, Lane& mine,
                                     Sums& sum) {
    if (mine.adds_gates && inside) {
      MOERGE_UNROLL
      for (int n = first; n < first + count; ++n) mine.gate_sum[n] += sum_of(gates[n][step]);
    }
    uint32_t b[count][2][3];
    MOERGE_UNROLL
    for (int n = 0; n < count; ++n) {
      const Bytes16 four = gates[first + n][step];
      split(as_float(four.word[0]), as_float(four.word[1]), b[n][0]);
      split(as_float(four.word[2]), as_float(four.word[3]), b[n][1]);
      gates[first + n][step] = load_gate(mine, next, first + n, step);
    }
    MOERGE_UNROLL
    for (int half = 0; half < 2; ++half) {
      uint32_t a[3][4];
      left<plain>(token, half, step, inside, mine, a);
      float part[count][4] = {};
      if constexpr (!plain) add_product<2, 0>(a, b, part), add_product<1, 1>(a, b, part);
      add_product<0, 2>(a, b, part);
      if constexpr (!plain) add_product<1, 0>(a, b, part);
      add_product<0, 1>(a, b, part), add_product<0, 0>(a, b, part);
      MOERGE_UNROLL
      for (int n = 0; n < count; ++n) {
        MOERGE_UNROLL
        for (int j = 0; j < 4; ++j) sum[half][first + n][j] += part[n][j];
      }
    }
  }

  // All chunks of the warp; the ring's first kStages - 1 are under way, and the gates of the first.
  template <bool plain>
  MOERGE_DEVICE void run(int chunk, int end, Gates& gates, Lane& mine, Sums& sum) const {
    const int stride = splits();
    for (int stage = 0; chunk < end; chunk += stride, stage = stage + 1 < kStages ? stage + 1 : 0) {
      copy_tokens(mine, stage > 0 ? stage - 1 : kStages - 1, chunk + (kStages - 1) * stride, end);
      async_wait<kStages - 1>();
      Tokens token;
      MOERGE_UNROLL
      for (int row = 0; row < 4; ++row) {
        MOERGE_UNROLL
        for (int i = 0; i < kPieces * 4; ++i) token[row][i] = load_shared(piece(mine, stage, row, i / 4) + i % 4 * 4);
      }
      const bool inside = chunk * kFeatures + mine.column < mine.D;
      if (mine.adds_moments) add_moments<plain>(token, inside, mine);
      const int next = chunk + stride < end ? chunk + stride : chunk;
      MOERGE_UNROLL
      for (int step = 0; step < 2; ++step) {
        constexpr int kFirst = kTiles > 5 ? kTiles / 2 : kTiles, kRest = kTiles - kFirst;  // what registers hold
        multiply<plain, 0, kFirst>(token, gates, step, inside, next, mine, sum);
        if constexpr (kRest > 0) multiply<plain, kFirst, kRest>(token, gates, step, inside, next, mine, sum);
      }
    }
  }

  MOERGE_DEVICE static float sum_of_four_lanes(float value) {
    value += shuffle_xor(value, 1);
    return value + shuffle_xor(value, 2);
  }

  // What each warp has, into shared memory.
  MOERGE_DEVICE void keep(const Memory& m, const Lane& mine, const Sums& sum) const {
    const int g = lane() / 4, i = lane() % 4;
    MOERGE_UNROLL
    for (int row = 0; row < 4; ++row) {
      float* to = m.sums() + (warp() * kTokens + g + row * 8) * kSumStride + i * 2;
      MOERGE_UNROLL
      for (int n = 0; n < kTiles; ++n)
        to[n * 8] = sum[row / 2][n][row % 2 * 2], to[n * 8 + 1] = sum[row / 2][n][row % 2 * 2 + 1];
    }
    if (!standardizes()) return;
    MOERGE_UNROLL
    for (int row = 0; row < 4; ++row) {
      const float all = sum_of_four_lanes(mine.sum[row]), squares = sum_of_four_lanes(mine.squares[row]);
      float* to = m.moments + (warp() * kTokens + g + row * 8) * kMoments;
      if (i == 0) to[0] = mine.shift[row], to[1] = all, to[2] = squares;
    }
    MOERGE_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      const float all = sum_of_four_lanes(mine.gate_sum[n]);
      if (i == 0) m.gates[warp() * kExperts + n * 8 + g] = all;
    }
  }

  // The warps' parts are added up in order; `from` of the first, each `stride` on.
  MOERGE_DEVICE float over_splits(const float* from, int stride) const {
    float sum = 0;
    MOERGE_UNROLL
    for (int i = 0; i < kWarps; ++i)
      if (i < splits()) sum += from[(i << group_bits) * stride];
    return sum;
  }

  MOERGE_DEVICE void store(const Memory& m) const {
    const int tokens = kTokens << group_bits;
    const int64_t first = block_x() * tokens, first_expert = block_y() * kExperts;
    float* similarity = static_cast<float*>(p.similarity) + block_z() * p.T * p.E;
    for (int i = thread(); i < tokens * kExperts; i += kThreads) {
      const int row = i / kExperts, e = i % kExperts;
      if (first + row < p.T && first_expert + e < p.E)
        similarity[(first + row) * p.E + first_expert + e] =
            over_splits(m.sums() + row * kSumStride + e, kTokens * kSumStride);
    }
    if (!standardizes()) return;
    if (const int row = thread(); block_y() == 0 && row < tokens && first + row < p.T) {
      const float* from = m.moments + row * kMoments;
      float* to = p.moments + (block_z() * p.T + first + row) * kMoments;
      to[0] = from[0];
      for (int i = 1; i < 3; ++i) to[i] = over_splits(from + i, kTokens * kMoments);
    }
    if (const int e = thread(); block_x() == 0 && e < kExperts && first_expert + e < p.E)
      p.gate_sums[block_z() * p.E + first_expert + e] = over_splits(m.gates + e, kExperts);
  }

  MOERGE_DEVICE void operator()() const {
    Shared shared;
    Memory m;
    m.ring = shared.take<char>(kRing > kSums ? kRing : kSums);
    m.moments = shared.take<float>(kWarps * kTokens * kMoments);
    m.gates = shared.take<float>(kWarps * kExperts);
    const int64_t chunks = (p.D + kFeatures - 1) / kFeatures;
    const int begin = static_cast<int>(chunks * block_z() / p.parts) + split_of_features();
    const int end = static_cast<int>(chunks * (block_z() + 1) / p.parts);
    Lane mine = lane_of(m);
    MOERGE_UNROLL
    for (int i = 0; i < kStages - 1; ++i) copy_tokens(mine, i, begin + i * splits(), end);
    Gates gates;
    MOERGE_UNROLL
    for (int i = 0; i < kTiles * 2; ++i) gates[i / 2][i % 2] = load_gate(mine, begin, i / 2, i % 2);
    Sums sum = {};
    const bool plain = prepare(mine);
    if (std::is_same_v<X, bf16> && plain)
      run<std::is_same_v<X, bf16>>(begin, end, gates, mine, sum);
    else
      run<false>(begin, end, gates, mine, sum);
    async_wait<0>();
    sync_block();  // nobody reads the ring any more
    keep(m, mine, sum);
    sync_block();
    store(m);
  }
};

}  // namespace moerge::cuda::scores_mma
