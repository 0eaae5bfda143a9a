// routed_lora and routed_linear for up to kDecodeTokens tokens in one launch, of 16-bit x, W and bank:
//
//   s_te = norm(x_t) . g_e           one expert per block at a time, all tokens
//   -- barrier of the grid --
//   w, e = select(s_t)               by every block for itself
//   h_tk = A_e x_t                   in kDecodeParts pieces of D, one (slot, piece) per block at a time
//   -- barrier of the grid --
//   y_t  = W x_t + b + sum_k w_tk (B_e h_tk + bias_e)      16 columns of y per block at a time
//
// W is streamed by tensor cores (16 rows of W by 8 or 16 columns of tokens, 8 warps sharing D) and never touches shared
// memory: k can be dealt to the fragments in any order, so each lane loads 16 bytes of a row of W and of a row of x,
// and uses them for two products. A block streams half of its first rows of W between arriving at each barrier and
// waiting there, so the router's chain of dependent latencies (a barrier, A, a barrier, B) lies under the stream; what
// comes before the first barrier lies under the second-level cache's fetching of that half. y is written once, every
// sum has a fixed order that depends on shapes alone, and nothing of one launch is left for the next.
//
// Blocks run together (a cooperative launch: as many as fit, and capturable), which is all that sm_80 and sm_90 need in
// common. A cluster per token would have shorter barriers, but its 8 processors would read all gates: 340 KB each of
// 166 experts, which at 50 to 100 GB/s is most of the time that the others need for W.
//
// Predicted, not measured, for an H200 (4.3 TB/s, a dependent launch 2 to 2.5 us), D = O = 4096, bf16, E = 36, K = 2,
// R = 16, T = 1: W, gates, A and B are 34.7 MB: 8.1 us beside 7.8 us of the base alone; the tail after the stream
// (pieces of h, B, one sum over the block) about 1 us. Without W: two barriers of the grid of about 1 us, and three
// latencies.
#include "lora_mma.cuh"
#include "route_select.cuh"

namespace moerge::cuda {

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kColumns = 16;           // of y per block at a time: rows of W
constexpr int64_t kMostSlots = 8;      // experts per token
constexpr int64_t kMostRanks = 128;    // at least two threads per rank
constexpr int64_t kMostHidden = 4096;  // T x K x R
constexpr int kDepth = 4;              // loads of W under way per lane, times two

template <class T>
MOERGE_DEVICE void load8_once(const void* data, int64_t i, float (&out)[8]) {
  const Bytes16 words = load16_once(static_cast<const T*>(data) + i);
  for (int j = 0; j < 4; ++j) out[2 * j] = low_half<T>(words.word[j]), out[2 * j + 1] = high_half<T>(words.word[j]);
}

template <class T, int kTokens>
struct RoutedDecode {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr int kLeastBlocks = 2;
  static constexpr const char* kName = "routed_decode";
  static constexpr int kItems = kTokens * kColumns / 8, kSplits = kThreads / kItems;  // of the expand
  static constexpr int kTiles = (kTokens + 7) / 8;                                    // of 8 columns of tokens
  using Product = float[kTiles][4];                                                   // one lane's part of W x
  Decode p;
  int64_t blocks;  // of the launch

  struct Memory {
    float* sums;                    // [kThreads, 8]: between threads
    float* products;                // [kWarps, kColumns, kTokens]: of W and x
    Statistics<float>* statistics;  // [kTokens]
    float* weights;                 // [T, K]
    int32_t* experts;               // [T, K]
    float* hidden;                  // [T, K, R]
  };
  static size_t shared(const Decode& p) {
    const size_t slots = p.route.T * p.route.K;
    return shared_size(kThreads * 8 * 4) + shared_size(kWarps * kColumns * kTokens * 4) +
           shared_size(kTokens * sizeof(Statistics<float>)) + 2 * shared_size(slots * 4) +
           shared_size(slots * p.a.ranks * 4);
  }

  MOERGE_DEVICE const T* token(int64_t t) const { return static_cast<const T*>(p.route.x.data) + t * p.route.x.stride; }
  MOERGE_DEVICE bool used(const Memory& m, int64_t slot) const { return m.weights[slot] != 0; }

  // ---- W x --------------------------------------------------------------------------------------------------------

  // This warp's part of D, in blocks of 32 columns: [0] to [1] before the second barrier's chance, [1] to [2] after it.
  struct Range {
    int64_t begin, middle, end;
  };
  MOERGE_DEVICE Range range() const {
    const int64_t all = (p.route.D + 31) / 32, begin = all * warp() / kWarps, end = all * (warp() + 1) / kWarps;
    return {begin, begin + (end - begin + 1) / 2, end};
  }

  // The row of W whose column `half * 8 + lane / 4` of the block of y this is; null: there is none.
  MOERGE_DEVICE const T* weight_row(int64_t block, int half) const {
    const int64_t o = block * kColumns + half * 8 + lane() / 4;
    return o < p.b.columns ? static_cast<const T*>(p.weight.data) + o * p.weight.stride : nullptr;
  }

  MOERGE_DEVICE void fetch(int64_t block) const {
    const Range mine = range();
    for (int half = 0; half < 2; ++half) {
      const T* row = weight_row(block, half);
      for (int64_t i = mine.begin; row && i < mine.middle; ++i)
        if (const int64_t c = i * 32 + lane() % 4 * 8; lane() % 2 == 0 && c < p.route.D) prefetch(row + c);
    }
  }

  MOERGE_DEVICE void stream(int64_t block, int64_t from, int64_t to, Product& sum) const {
    const T *upper = weight_row(block, 0), *lower = weight_row(block, 1);
    for (int64_t i = from; i < to; i += kDepth) {
      Bytes16 a[kDepth], b[kDepth], right[kDepth][kTiles];
      for (int j = 0; j < kDepth; ++j) {
        const int64_t c = (i + j) * 32 + lane() % 4 * 8;
        const bool inside = i + j < to && c < p.route.D;
        a[j] = inside && upper ? load16_once(upper + c) : Bytes16{};
        b[j] = inside && lower ? load16_once(lower + c) : Bytes16{};
        for (int tile = 0; tile < kTiles; ++tile) {
          const int t = tile * 8 + lane() / 4;
          right[j][tile] = inside && t < p.route.T ? load16(token(t) + c) : Bytes16{};
        }
      }
      for (int j = 0; j < kDepth; ++j)
        for (int tile = 0; tile < kTiles; ++tile)
          for (int k = 0; k < 4; k += 2)
            mma<T>(sum[tile], {a[j].word[k], b[j].word[k], a[j].word[k + 1], b[j].word[k + 1]},
                   {right[j][tile].word[k], right[j][tile].word[k + 1]});
    }
  }

  MOERGE_DEVICE void keep_products(const Memory& m, const Product& sum) const {
    for (int tile = 0; tile < kTiles; ++tile)
      for (int j = 0; j < 4; ++j) {
        const int column = lane() / 4 + j / 2 * 8, t = tile * 8 + lane() % 4 * 2 + j % 2;
        if (t < kTokens) m.products[(warp() * kColumns + column) * kTokens + t] = sum[tile][j];
      }
  }

  // ---- the router -------------------------------------------------------------------------------------------------

  MOERGE_DEVICE void find_statistics(const Memory& m) const {
    for (int64_t t = warp(); t < p.route.T; t += kWarps) {
      const Statistics<float> found =
          token_statistics<float, T, 8>(WarpTeam<float>{}, token(t), p.route.x.dtype, p.route.D, p.route.normalize);
      if (lane() == 0) m.statistics[t] = found;
    }
    sync_block();
  }

  MOERGE_DEVICE void score(const Memory& m, int64_t e) const {
    const float* gate = static_cast<const float*>(p.route.gates.data) + e * p.route.gates.stride;
    float sum[kTokens] = {};
    for (int64_t c = thread() * 8; c < p.route.D; c += kThreads * 8) {
      const Bytes16 low = load16_once(gate + c), high = load16_once(gate + c + 4);
      for (int t = 0; t < kTokens; ++t) {
        if (t >= p.route.T) break;
        float x[8];
        load_vector<T>(token(t), p.route.x.dtype, c, x);
        for (int i = 0; i < 8; ++i)
          sum[t] += m.statistics[t].normalized(x[i]) * as_float(i < 4 ? low.word[i] : high.word[i - 4]);
      }
    }
    for (int t = 0; t < kTokens; ++t) {
      sum[t] = warp_sum(sum[t]);
      if (lane() == 0) m.sums[warp() * kTokens + t] = sum[t];
    }
    sync_block();
    if (thread() < p.route.T) {
      float total = 0;
      for (int i = 0; i < kWarps; ++i) total += m.sums[i * kTokens + thread()];
      static_cast<float*>(p.route.similarity)[thread() * p.route.E + e] = total;
    }
    sync_block();
  }

  MOERGE_DEVICE void select(const Memory& m) const {
    const int64_t K = p.route.K;
    for (int64_t t = warp(); t < p.route.T; t += kWarps)
      Selection<float>{p.route}.run(t, m.weights + t * K, m.experts + t * K);
    sync_block();
    if (block_x() > 0) return;
    for (int i = thread(); i < p.route.T * K; i += kThreads) {
      static_cast<float*>(p.route.weights)[i] = m.weights[i];
      p.route.experts[i] = m.experts[i];
    }
  }

  // ---- A x --------------------------------------------------------------------------------------------------------

  // Piece `part` of slot `slot`: a thread adds up 8 ranks over some of the columns; then threads add those up in two
  // steps, in order.
  MOERGE_DEVICE void shrink(const Memory& m, int64_t slot, int64_t part) const {
    if (!used(m, slot)) return;
    const int R = static_cast<int>(p.a.ranks), groups = R / 8, rows = kThreads / groups;
    const int group = thread() % groups, row = thread() / groups;
    const int64_t length = (p.route.D + kDecodeParts - 1) / kDecodeParts;
    const int64_t begin = part * length, end = begin + length < p.route.D ? begin + length : p.route.D;
    const int64_t from = m.experts[slot] * p.a.expert + group * 8;
    const T* x = token(slot / p.route.K);
    float sum[8] = {};
    for (int64_t c = begin + row; row < rows && c < end; c += rows) {
      float value[8];
      load8_once<T>(p.a.data, from + c * p.a.column, value);
      for (int i = 0; i < 8; ++i) sum[i] += to_float(x[c]) * value[i];
    }
    for (int i = 0; row < rows && i < 8; ++i) m.sums[row * R + group * 8 + i] = sum[i];
    sync_block();
    const int steps = kThreads / R, step = thread() / R, each = (rows + steps - 1) / steps;
    float total = 0;
    for (int i = step * each; step < steps && i < (step + 1) * each && i < rows; ++i)
      total += m.sums[i * R + thread() % R];
    sync_block();
    if (step < steps) m.sums[thread()] = total;
    sync_block();
    if (thread() < R) {
      for (int i = 1; i < steps; ++i) total += m.sums[i * R + thread()];
      p.parts[(part * p.route.T * p.route.K + slot) * R + thread()] = total;
    }
    sync_block();
  }

  // hidden: what slot k of a token adds of B, the weight in it
  MOERGE_DEVICE void collect(const Memory& m) const {
    const int64_t K = p.route.K, R = p.a.ranks, slots = p.route.T * K;
    for (int64_t i = thread(); i < slots * R; i += kThreads) {
      float sum = 0;
      for (int64_t part = 0; used(m, i / R) && part < kDecodeParts; ++part) sum += p.parts[part * slots * R + i];
      m.hidden[i] = m.weights[i / R] * sum;
    }
    sync_block();
    if (!p.factored) return;
    for (int64_t i = thread(); i < p.route.T * R; i += kThreads) {
      const int64_t t = i / R, r = i % R;
      float sum = 0;
      for (int64_t k = 0; k < K; ++k) sum += m.hidden[(t * K + k) * R + r];
      for (int64_t k = 0; k < K; ++k) m.hidden[(t * K + k) * R + r] = m.weights[t * K + k] * sum;
    }
    sync_block();
  }

  // ---- y ----------------------------------------------------------------------------------------------------------

  // sums [kSplits, kItems, 8]: each thread some of the (slot, rank) terms of 8 columns of one token
  MOERGE_DEVICE void expand(const Memory& m, int64_t block) const {
    const int item = thread() % kItems, split = thread() / kItems, t = item / (kColumns / 8);
    const int64_t c = block * kColumns + item % (kColumns / 8) * 8;
    const int K = static_cast<int>(p.route.K), R = static_cast<int>(p.a.ranks);
    float sum[8] = {};
    for (int j = split; t < p.route.T && c < p.b.columns && j < K * R; j += kSplits) {
      const int slot = t * K + j / R;
      if (!used(m, slot)) continue;
      float value[8];
      load8_once<T>(p.b.data, m.experts[slot] * p.b.expert + j % R * p.b.rank + c, value);
      for (int i = 0; i < 8; ++i) sum[i] += m.hidden[t * K * R + j] * value[i];
    }
    for (int i = 0; i < 8; ++i) m.sums[thread() * 8 + i] = sum[i];
  }

  MOERGE_DEVICE void write(const Memory& m, int64_t block) const {
    const int t = thread() / kColumns, column = thread() % kColumns;
    const int64_t o = block * kColumns + column;
    if (t >= p.route.T || o >= p.b.columns) return;
    float value = 0;
    if (p.weight.data) {
      for (int i = 0; i < kWarps; ++i) value += m.products[(i * kColumns + column) * kTokens + t];
      if (p.linear_bias) value += to_float(static_cast<const T*>(p.linear_bias)[o]);
    } else {
      value = to_float(static_cast<const T*>(p.base.data)[t * p.base.stride + o]);
    }
    for (int i = 0; i < kSplits && i < p.route.K * p.a.ranks; ++i)
      value += m.sums[(i * kItems + t * (kColumns / 8) + column / 8) * 8 + column % 8];
    for (int64_t slot = t * p.route.K; p.lora_bias.data && slot < (t + 1) * p.route.K; ++slot)
      if (used(m, slot))
        value += m.weights[slot] *
                 load_as<float>(p.lora_bias.data, p.lora_bias.dtype, m.experts[slot] * p.lora_bias.stride + o);
    from_float(value, static_cast<T*>(p.out.data)[t * p.out.stride + o]);
  }

  MOERGE_DEVICE void finish(const Memory& m, int64_t block, const Product& product) const {
    if (p.weight.data) keep_products(m, product);
    expand(m, block);
    sync_block();
    write(m, block);
    sync_block();
  }

  MOERGE_DEVICE void operator()() const {
    Shared all;
    Memory m;
    const int64_t slots = p.route.T * p.route.K;
    m.sums = all.take<float>(kThreads * 8);
    m.products = all.take<float>(kWarps * kColumns * kTokens);
    m.statistics = all.take<Statistics<float>>(kTokens);
    m.weights = all.take<float>(slots);
    m.experts = all.take<int32_t>(slots);
    m.hidden = all.take<float>(slots * p.a.ranks);

    const int64_t columns = (p.b.columns + kColumns - 1) / kColumns;
    const Range mine = range();
    int64_t block = block_x();
    const bool streams = p.weight.data && block < columns;
    Product product = {};
    if (streams) fetch(block);
    if (block < p.route.E) find_statistics(m);
    for (int64_t e = block; e < p.route.E; e += blocks) score(m, e);
    uint32_t arrival = grid_arrive();
    if (streams) stream(block, mine.begin, mine.middle, product);
    grid_wait(arrival);
    select(m);
    for (int64_t i = block; i < slots * kDecodeParts; i += blocks) shrink(m, i / kDecodeParts, i % kDecodeParts);
    arrival = grid_arrive();
    if (streams) stream(block, mine.middle, mine.end, product);
    grid_wait(arrival);
    collect(m);
    for (; block < columns; block += blocks) {
      finish(m, block, product);
      if (!p.weight.data || block + blocks >= columns) continue;
      for (auto& tile : product)
        for (float& value : tile) value = 0;
      stream(block + blocks, mine.begin, mine.end, product);
    }
  }
};

template <class T, int kTokens>
bool run(const Decode& p, Stream stream) {
  using Kernel = RoutedDecode<T, kTokens>;
  const size_t shared = Kernel::shared(p);
  const int64_t columns = ceil_div(p.b.columns, kColumns), pieces = p.route.T * p.route.K * kDecodeParts;
  int64_t blocks = columns > pieces ? columns : pieces;
  if (blocks < p.route.E) blocks = p.route.E;
  if (const int64_t most = most_together<Kernel>(shared); blocks > most) blocks = most;
  if (blocks == 0) return false;
  launch_together(blocks, shared, stream, Kernel{p, blocks});
  return true;
}

template <class T>
bool run_tokens(const Decode& p, Stream stream) {
  if (p.route.T == 1) return run<T, 1>(p, stream);
  if (p.route.T <= 4) return run<T, 4>(p, stream);
  if (p.route.T <= 8) return run<T, 8>(p, stream);
  return run<T, 16>(p, stream);
}

// A row of T elements may be read 16 bytes at a time.
bool rows_fit(const Matrix& m, DType dtype) { return m.dtype == dtype && aligned16(m.data, m.stride * 2); }

}  // namespace

Reason against_decode(const Decode& p) {
  const Route& r = p.route;
  const DType dtype = r.x.dtype;
  if (r.T < 1 || r.T > kDecodeTokens) return "it is for 1 to 16 tokens";
  if (!is_16_bit(dtype) || r.wide) return "the tokens are not of 16 bits";
  if (r.K > kMostSlots || r.T * r.K * p.a.ranks > kMostHidden) return "too many experts per token for this rank";
  if (p.a.ranks < 8 || p.a.ranks % 8 || p.a.ranks > kMostRanks) return "the rank is too large or no multiple of 8";
  if (r.D % 8 || r.D == 0 || p.b.columns % 8 || p.b.columns == 0) return "D or O is no multiple of 8";
  const bool bank = p.a.dtype == dtype && p.a.rank == 1 && aligned16(p.a.data, p.a.expert * 2) &&
                    p.a.column * 2 % 16 == 0 && p.b.dtype == dtype && p.b.column == 1 &&
                    aligned16(p.b.data, p.b.expert * 2) && p.b.rank * 2 % 16 == 0;
  const bool gates = r.gates.dtype == DType::f32 && aligned16(r.gates.data, r.gates.stride * 4);
  const bool base = p.weight.data ? rows_fit(p.weight, dtype) : p.base.dtype == dtype;
  if (!bank) return "the experts are of another type than the tokens, or not laid out rank by rank";
  if (!gates) return "the gates are not float32 at multiples of 16 bytes";
  if (!base || !rows_fit(r.x, dtype) || p.out.dtype != dtype)
    return "tokens, weight or base differ in type or alignment";
  return nullptr;
}

bool routed_decode(const Decode& p, Stream stream) {
  if (against_decode(p)) return false;
  return p.route.x.dtype == DType::bf16 ? run_tokens<bf16>(p, stream) : run_tokens<f16>(p, stream);
}

}  // namespace moerge::cuda
