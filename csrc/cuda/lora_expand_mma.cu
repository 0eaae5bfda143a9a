// out[t,c] = base[t,c] + sum_k H[t,k,:] . w[e,:,c] + sum_k w_tk bias[e,c] for many tokens: a block has 16 * kTiles
// tokens and 64 columns, and walks over the experts that these tokens name, in ascending order, with kStages tiles
// under way.
//
// A token's sum has one owner and a fixed order; base is read and out written once. H is rounded to the type of w once,
// after the weight; products of an expert with the rows of other tokens are made and thrown away, so that a NaN in an
// expert reaches only the tokens that use it.
#include "lora_mma.cuh"

namespace moerge::cuda {

namespace {

constexpr int kThreads = 128;
constexpr int kColumns = 64;              // of a block; each warp owns 16 of them
constexpr int kSumStride = kColumns + 4;  // floats
constexpr int64_t kMostExperts = 1024;
constexpr int64_t kMostSlots = 8;  // experts per token

template <class T, int ranks, bool kRanksAdjacent, int kTiles>
struct LoraExpandMma {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr int kLeastBlocks = 3;
  static constexpr const char* kName = "lora_expand_mma";
  static constexpr int kTokens = 16 * kTiles, kStages = ranks <= 64 ? 4 : 2;
  static constexpr int kTile = kTileElements<ranks, kColumns, kRanksAdjacent>;
  Lora p;
  const float* h;
  Factors w;
  Matrix base, bias, out;

  static int64_t hidden_stride(int64_t K) { return K * ranks + kPad; }
  static size_t shared(int64_t K) {
    return shared_size(kTokens * hidden_stride(K) * 2) + shared_size(kTokens * K * 4) +
           shared_size(kMostExperts / 32 * 4) + shared_size((kTokens * K + 1) * 4) + shared_size(kStages * kTile * 2) +
           shared_size(kTokens * kSumStride * 4);
  }

  struct Memory {
    T* hidden;       // [kTokens, K * ranks + kPad]
    int32_t* names;  // [kTokens, K]: the expert of a slot; -1: not used, or an earlier slot has it too
    uint32_t* seen;  // one bit per expert
    int32_t* list;   // the experts, ascending, and behind them how many
    T* factors;      // [kStages, kTile]
    float* sums;     // [kTokens, kSumStride]
  };

  // names and hidden: the slots of a token that name the same expert become one.
  MOERGE_DEVICE void fill_slots(const Memory& m, int64_t first) const {
    const int K = static_cast<int>(p.K), stride = K * ranks + kPad;
    for (int i = thread(); i < kMostExperts / 32; i += kThreads) m.seen[i] = 0;
    sync_block();
    for (int i = thread(); i < kTokens * K; i += kThreads) {
      const int64_t t = first + i / K;
      const int k = i % K;
      int32_t name = -1;
      if (t < p.T) {
        const Slots<float> slots(p, t);
        if (slots.used(k)) name = slots.experts[k];
        for (int j = 0; name >= 0 && j < k; ++j)
          if (slots.used(j) && slots.experts[j] == name) name = -1;
      }
      m.names[i] = name;
      if (name >= 0) atomic_or(m.seen + name / 32, 1u << name % 32);
    }
    for (int i = thread(); i < kTokens * ranks; i += kThreads) {
      const int64_t t = first + i / ranks;
      const int r = i % ranks;
      const bool inside = t < p.T && r < p.R;
      const Slots<float> slots(p, t < p.T ? t : 0);
      const float* ht = h + t * p.K * p.R;
      const float mean = inside && p.factored ? slots.mean(ht, r) : 0;
      for (int k = 0; k < K; ++k) {
        float sum = 0;
        for (int j = k; inside && slots.used(k) && j < K; ++j)
          if (slots.used(j) && slots.experts[j] == slots.experts[k])
            sum += slots.weights[j] * (p.factored ? mean : slots.value(ht, j, r));
        from_float(sum, m.hidden[i / ranks * stride + k * ranks + r]);
      }
    }
    sync_block();
  }

  // The set bits of `seen` become a list; one warp.
  MOERGE_DEVICE void list_experts(const Memory& m) const {
    if (warp() == 0) {
      uint32_t bits = m.seen[lane()];
      int at = 0;
      for (int i = 0; i < lane(); ++i) at += count_bits(m.seen[i]);
      if (lane() == 31) m.list[kTokens * p.K] = at + count_bits(bits);
      for (; bits; bits &= bits - 1) m.list[at++] = lane() * 32 + lowest_bit(bits);
    }
    sync_block();
  }

  MOERGE_DEVICE void copy_stage(const Memory& m, int count, int index) const {
    if (index < count)
      copy_tile<T, kThreads, ranks, kColumns, kRanksAdjacent>(w, m.list[index], block_y() * kColumns,
                                                              m.factors + index % kStages * kTile);
    async_commit();
  }

  // The slot in which a token names the expert; -1: none.
  MOERGE_DEVICE int slot_of(const Memory& m, int token, int32_t expert) const {
    const int K = static_cast<int>(p.K);
    for (int k = 0; k < K; ++k)
      if (m.names[token * K + k] == expert) return k;
    return -1;
  }

  MOERGE_DEVICE void add_expert(const Memory& m, const T* factors, int32_t expert, float (&sum)[kTiles][2][4]) const {
    constexpr int kStride = kRanksAdjacent ? ranks + kPad : kColumns + kPad;
    const int stride = static_cast<int>(p.K) * ranks + kPad;
    uint32_t b[ranks / 16][4];
    for (int k = 0; k < ranks; k += 16) load_right<kRanksAdjacent>(b[k / 16], factors, kStride, k, warp() * 16);
    for (int tile = 0; tile < kTiles; ++tile) {
      const int upper = tile * 16 + lane() / 4, lower = upper + 8;
      const int slot_upper = slot_of(m, upper, expert), slot_lower = slot_of(m, lower, expert);
      if (!ballot(slot_upper >= 0 || slot_lower >= 0)) continue;
      const T* from_upper = m.hidden + upper * stride + (slot_upper < 0 ? 0 : slot_upper) * ranks + lane() % 4 * 2;
      const T* from_lower = m.hidden + lower * stride + (slot_lower < 0 ? 0 : slot_lower) * ranks + lane() % 4 * 2;
      float product[2][4] = {};
      for (int k = 0; k < ranks; k += 16) {
        const uint32_t a[4] = {load_pair(from_upper + k), load_pair(from_lower + k), load_pair(from_upper + k + 8),
                               load_pair(from_lower + k + 8)};
        mma<T>(product[0], a, {b[k / 16][0], b[k / 16][1]});
        mma<T>(product[1], a, {b[k / 16][2], b[k / 16][3]});
      }
      for (int n = 0; n < 2; ++n)
        for (int j = 0; j < 4; ++j)
          if ((j < 2 ? slot_upper : slot_lower) >= 0) sum[tile][n][j] += product[n][j];
    }
  }

  MOERGE_DEVICE void write(const Memory& m, int64_t first, const float (&sum)[kTiles][2][4]) const {
    for (int tile = 0; tile < kTiles; ++tile)
      for (int n = 0; n < 2; ++n)
        for (int j = 0; j < 4; ++j) {
          const int row = tile * 16 + lane() / 4 + j / 2 * 8, column = warp() * 16 + n * 8 + lane() % 4 * 2 + j % 2;
          m.sums[row * kSumStride + column] = sum[tile][n][j];
        }
    sync_block();
    for (int i = thread(); i < kTokens * kColumns / 8; i += kThreads) {
      const int64_t t = first + i / (kColumns / 8), c = block_y() * kColumns + i % (kColumns / 8) * 8;
      if (t >= p.T || c >= w.columns) continue;
      float value[8];
      for (int j = 0; j < 8; ++j) value[j] = m.sums[i / (kColumns / 8) * kSumStride + i % (kColumns / 8) * 8 + j];
      const Slots<float> slots(p, t);
      for (int64_t k = 0; bias.data && k < p.K; ++k) {
        if (!slots.used(k)) continue;
        for (int j = 0; j < 8; ++j)
          value[j] += slots.weights[k] * load_as<float>(bias.data, bias.dtype, slots.experts[k] * bias.stride + c + j);
      }
      if (base.data) {
        float before[8];
        load_vector<T>(base.data, base.dtype, t * base.stride + c, before);
        for (int j = 0; j < 8; ++j) value[j] += before[j];
      }
      store_vector<T>(out.data, out.dtype, t * out.stride + c, value);
    }
  }

  MOERGE_DEVICE void operator()() const {
    Shared all;
    Memory m;
    m.hidden = all.take<T>(kTokens * (p.K * ranks + kPad));
    m.names = all.take<int32_t>(kTokens * p.K);
    m.seen = all.take<uint32_t>(kMostExperts / 32);
    m.list = all.take<int32_t>(kTokens * p.K + 1);
    m.factors = all.take<T>(kStages * kTile);
    m.sums = all.take<float>(kTokens * kSumStride);
    const int64_t first = block_x() * kTokens;
    fill_slots(m, first);
    list_experts(m);
    const int count = m.list[kTokens * p.K];
    for (int i = 0; i < kStages - 1; ++i) copy_stage(m, count, i);
    float sum[kTiles][2][4] = {};
    for (int i = 0; i < count; ++i) {
      async_wait<kStages - 2>();
      sync_block();  // this tile is here, and nobody reads the one that is overwritten next
      copy_stage(m, count, i + kStages - 1);
      add_expert(m, m.factors + i % kStages * kTile, m.list[i], sum);
    }
    write(m, first, sum);
  }
};

template <class Kernel>
void run(const Lora& p, const void* h, const Factors& w, const Matrix& base, const Matrix& bias, const Matrix& out,
         Stream stream) {
  launch({ceil_div(p.T, Kernel::kTokens), ceil_div(w.columns, kColumns)}, Kernel::shared(p.K), stream,
         Kernel{p, static_cast<const float*>(h), w, base, bias, out});
}

// More tokens in a block share what is read of the experts; fewer give more blocks, and always fit (K <= kMostSlots).
template <class T, int ranks, bool kRanksAdjacent>
void run_tiles(const Lora& p, const void* h, const Factors& w, const Matrix& base, const Matrix& bias,
               const Matrix& out, Stream stream) {
  using Large = LoraExpandMma<T, ranks, kRanksAdjacent, 4>;
  using Small = LoraExpandMma<T, ranks, kRanksAdjacent, 1>;
  if (p.T >= kExpandManyTokens && Large::shared(p.K) <= kMostShared)
    run<Large>(p, h, w, base, bias, out, stream);
  else
    run<Small>(p, h, w, base, bias, out, stream);
}

template <class T, int ranks>
void run_layout(const Lora& p, const void* h, const Factors& w, const Matrix& base, const Matrix& bias,
                const Matrix& out, Stream stream) {
  if (ranks_adjacent(w))
    run_tiles<T, ranks, true>(p, h, w, base, bias, out, stream);
  else
    run_tiles<T, ranks, false>(p, h, w, base, bias, out, stream);
}

template <class T>
void run_ranks(const Lora& p, const void* h, const Factors& w, const Matrix& base, const Matrix& bias,
               const Matrix& out, Stream stream) {
  switch (padded_ranks(p.R)) {
    case 16:
      return run_layout<T, 16>(p, h, w, base, bias, out, stream);
    case 32:
      return run_layout<T, 32>(p, h, w, base, bias, out, stream);
    case 64:
      return run_layout<T, 64>(p, h, w, base, bias, out, stream);
    default:
      return run_layout<T, 128>(p, h, w, base, bias, out, stream);
  }
}

}  // namespace

Reason expand_against_tensor_cores(const Lora& p, const Factors& w, const Matrix& base, const Matrix& out) {
  if (p.T < kLoraMmaTokens) return "few tokens";
  if (p.K == 0 || p.R == 0) return "there is nothing to multiply";
  if (p.K > kMostSlots || p.E > kMostExperts) return "too many experts, or too many of them per token";
  if (p.wide) return "float64";
  if (Reason reason = against_copies(w)) return reason;
  if (out.dtype != w.dtype || (base.data && base.dtype != w.dtype)) return "base and experts are of different types";
  const bool aligned = aligned16(out.data, out.stride * 2) && (!base.data || aligned16(base.data, base.stride * 2));
  return aligned ? nullptr : "the base does not begin at multiples of 16 bytes";
}

void lora_expand_mma(const Lora& p, const void* h, const Factors& w, const Matrix& base, const Matrix& bias,
                     const Matrix& out, Stream stream) {
  if (w.dtype == DType::bf16)
    run_ranks<bf16>(p, h, w, base, bias, out, stream);
  else
    run_ranks<f16>(p, h, w, base, bias, out, stream);
}

}  // namespace moerge::cuda
