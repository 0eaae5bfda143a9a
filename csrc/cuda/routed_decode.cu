// routed_lora and routed_linear for up to kDecodeTokens tokens in one launch, of 16-bit x, W and bank:
//
//   s_te = norm(x_t) . g_e           one part of the features and one expert per block at a time, all tokens
//   -- barrier of the grid --
//   w, e = select(s_t)               by every block for itself; first the tokens whose A it multiplies
//   h_tk = A_e x_t                   in pieces of D, one (slot, piece) per block at a time
//   -- barrier of the grid --
//   y_t  = W x_t + b + sum_k w_tk (B_e h_tk + bias_e)      32 columns of y per block at a time
//
// The router and the two barriers are a chain of latencies, W is all of the bytes; so W is asked for early, in groups,
// and in the order in which memory should serve: x and gates, two groups of W, A, two more groups, B. Before a block
// arrives at a barrier, W is only fetched to the second-level cache, since the fence of the arrival may wait for loads
// under way; between arriving and waiting it is loaded and multiplied (routed_weight.cuh). y is written once, every sum
// has a fixed order that depends on shapes alone, and nothing of one launch is left for the next.
//
// A block has 512 threads and a processor to itself: x is read once per processor for W.
//
// Blocks run together (a cooperative launch: as many as fit, and capturable), which is all that sm_80 and sm_90 need in
// common. A cluster per token would have shorter barriers, but its 8 processors would read all gates: 340 KB each of
// 166 experts, which at 50 to 100 GB/s is most of the time that the others need for W.
//
// On an H200, D = O = 4096, bf16, K = 2, R = 16, E = 8 / 36 / 166, the base alone 13.5 us: T = 1 takes 22.0 / 22.5
// / 25.5 us, T = 8 33.2 / 34.0 / 36.6, T = 16 38.4 / 39.3 / 45.3 (several launches less: kDecodeLinearTokens). With
// statistics in two passes first and everything selected by everybody it was 23.4 / 24.8 / 26.5, 28.3 / 29.8
// / 32.0, 41.9 / 45.2 / 49.6.
#include "routed_router.cuh"
#include "routed_weight.cuh"

namespace moerge::cuda {

namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kMostSlots = 8;           // experts per token
constexpr int64_t kMostExperts = 1024;  // whose scores every warp holds
constexpr int kMostRanks = 128;         // at least two threads per rank
constexpr int64_t kMostHidden = 4096;   // T x K x R
constexpr int kFetched = 2;             // groups of W that are fetched ahead
constexpr int kBatch = 4;               // loads of A per thread at once

template <class T, int kTokens>
struct RoutedDecode {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr int kLeastBlocks = 1;
  static constexpr const char* kName = "routed_decode";
  static constexpr int kItems = kTokens * kColumns / 8, kSplits = kThreads / kItems;  // of the expand
  static constexpr int kAhead = 2;                                                    // of its terms are loaded early
  using Router = DecodeRouter<T, kTokens, kThreads>;
  using Weight = DecodeWeight<T, kTokens, kThreads>;
  Decode p;
  int64_t blocks;   // of the launch
  int64_t scratch;  // floats for keys and products
  int lanes;        // per column of A: 8 ranks each, a power of 2
  int staged;       // groups of W in shared memory: kStaged, or 0 where that is too small

  struct Memory {
    float* sums;       // between threads
    float* products;   // [kWarps, kColumns, kTokens]: of W and x
    uint32_t* keys;    // [kWarps, E], before the products
    float* weights;    // [T, K]
    int32_t* experts;  // [T, K]
    float* hidden;     // [T, K, R]
    Bytes16* weight;   // see DecodeWeight
  };
  static constexpr int kItemWarps = kItems > 32 ? kItems / 32 : 1, kAdders = kWarps / kItemWarps;
  static constexpr int kLeastSums = Router::kSums > kAdders * kItems * 8 ? Router::kSums : kAdders * kItems * 8;
  static constexpr int kSums = kLeastSums > kWarps* kMostRanks ? kLeastSums : kWarps * kMostRanks;
  static constexpr int kSlots = kTokens * kMostSlots;
  static int64_t scratch_of(int64_t E) { return kWarps * (E > kColumns * kTokens ? E : kColumns * kTokens); }
  static size_t shared(const Decode& p, int staged) {
    return shared_size(kSums * 4) + 2 * shared_size(kSlots * 4) + shared_size(scratch_of(p.route.E) * 4) +
           shared_size(p.route.T * p.route.K * p.a.ranks * 4) + staged * Weight::kStage * 16;
  }

  MOERGE_DEVICE const T* token(int64_t t) const { return static_cast<const T*>(p.route.x.data) + t * p.route.x.stride; }
  MOERGE_DEVICE bool used(const Memory& m, int64_t slot) const { return m.weights[slot] != 0; }

  // ---- who uses what ------------------------------------------------------------------------------------------------

  // Pieces of A x that this block computes, and the tokens from `first` on that they belong to.
  struct Share {
    int begin, end, first, tokens;
  };
  MOERGE_DEVICE Share share() const {
    const int64_t K = p.route.K, pieces = p.route.T * K * p.pieces;
    const int begin = static_cast<int>(pieces * block_x() / blocks);
    const int end = static_cast<int>(pieces * (block_x() + 1) / blocks), each = static_cast<int>(K * p.pieces);
    return {begin, end, begin / each, end > begin ? (end - 1) / each - begin / each + 1 : 0};
  }

  MOERGE_DEVICE void select(const Memory& m, int t) const {
    const int64_t K = p.route.K;
    Router{p.route, blocks}.select(t, m.keys + warp() * p.route.E, m.weights + t * K, m.experts + t * K);
  }
  MOERGE_DEVICE void select_mine(const Memory& m, const Share& mine) const {
    for (int i = warp(); i < mine.tokens; i += kWarps) select(m, mine.first + i);
    sync_block();
  }
  MOERGE_DEVICE void select_others(const Memory& m, const Share& mine) const {
    for (int i = warp(); i < p.route.T - mine.tokens; i += kWarps)
      select(m, i < mine.first || mine.tokens == 0 ? i : i + mine.tokens);
    sync_block();
    if (block_x() > 0) return;
    for (int i = thread(); i < p.route.T * p.route.K; i += kThreads) {
      static_cast<float*>(p.route.weights)[i] = m.weights[i];
      p.route.experts[i] = m.experts[i];
    }
  }

  // ---- A x --------------------------------------------------------------------------------------------------------

  // Piece `part` of slot `slot`: a thread adds up 8 ranks over some of the columns, then lanes and warps are added.
  // `meanwhile` is done once the first loads are under way.
  template <class Meanwhile>
  MOERGE_DEVICE void shrink(const Memory& m, int slot, int part, const Meanwhile& meanwhile) const {
    if (!used(m, slot)) return meanwhile();
    const int R = static_cast<int>(p.a.ranks), group = thread() % lanes, rows = kThreads / lanes;
    const int D = static_cast<int>(p.route.D), length = static_cast<int>((D + p.pieces - 1) / p.pieces);
    const int begin = part * length, end = begin + length < D ? begin + length : D;
    const T* a = static_cast<const T*>(p.a.data) + m.experts[slot] * p.a.expert + group * 8;
    const T* x = token(slot / p.route.K);
    float sum[8] = {};
    int first = begin + thread() / lanes;
    bool begun = false;
    do {
      Bytes16 words[kBatch];
      float left[kBatch], value[8];
      for (int j = 0; j < kBatch; ++j) {
        const int c = first + j * rows;
        const bool valid = c < end && group * 8 < R;
        words[j] = valid ? load16_once(a + c * p.a.column) : Bytes16{};
        left[j] = valid ? to_float(x[c]) : 0;
      }
      if (!begun) meanwhile();
      begun = true;
      for (int j = 0; j < kBatch; ++j) {
        unpack<T>(words[j], value);
        for (int i = 0; i < 8; ++i) sum[i] += left[j] * value[i];
      }
      first += kBatch * rows;
    } while (first < end);
    const Shares mine = add_lanes(sum, lanes);
    for (int i = 0; i < 8; ++i)
      if (mine.writes && group * 8 < R && i < mine.count) m.sums[warp() * R + group * 8 + mine.first + i] = sum[i];
    sync_block();
    if (thread() < R) {
      float total = 0;
      for (int i = 0; i < kWarps; ++i) total += m.sums[i * R + thread()];
      p.parts[(part * p.route.T * p.route.K + slot) * R + thread()] = total;
    }
    sync_block();
  }

  // hidden: what slot k of a token adds of B, the weight in it
  MOERGE_DEVICE void collect(const Memory& m) const {
    const int K = static_cast<int>(p.route.K), R = static_cast<int>(p.a.ranks);
    const int T_ = static_cast<int>(p.route.T), all = T_ * K * R;
    for (int i = thread(); i < all; i += kThreads) {
      float part[kDecodeParts], sum = 0;
      const bool valid = used(m, i / R);
      for (int j = 0; j < kDecodeParts; ++j) part[j] = valid && j < p.pieces ? p.parts[j * all + i] : 0;
      for (int j = 0; j < kDecodeParts; ++j) sum += part[j];
      m.hidden[i] = m.weights[i / R] * sum;
    }
    sync_block();
    if (!p.factored) return;
    for (int i = thread(); i < T_ * R; i += kThreads) {
      const int t = i / R, r = i % R;
      float sum = 0;
      for (int k = 0; k < K; ++k) sum += m.hidden[(t * K + k) * R + r];
      for (int k = 0; k < K; ++k) m.hidden[(t * K + k) * R + r] = m.weights[t * K + k] * sum;
    }
    sync_block();
  }

  // ---- y ----------------------------------------------------------------------------------------------------------

  // Each thread has some of the (slot, rank) terms of 8 columns of one token: every kSplits-th.
  MOERGE_DEVICE static int token_of_terms() { return thread() % kItems / (kColumns / 8); }
  // Where term j of the block's lies in B; null: it is not used.
  MOERGE_DEVICE const T* term(const Memory& m, int64_t block, int j) const {
    const int K = static_cast<int>(p.route.K), R = static_cast<int>(p.a.ranks), k = j / R, t = token_of_terms();
    const int64_t column = block * kColumns + thread() % (kColumns / 8) * 8;
    if (k >= K || t >= p.route.T || column >= p.b.columns || !used(m, t * K + k)) return nullptr;
    return static_cast<const T*>(p.b.data) + m.experts[t * K + k] * p.b.expert + (j - k * R) * p.b.rank + column;
  }
  MOERGE_DEVICE void add_term(const Memory& m, int j, const Bytes16& words, float (&sum)[8]) const {
    float value[8];
    unpack<T>(words, value);
    const float left = m.hidden[token_of_terms() * static_cast<int>(p.route.K * p.a.ranks) + j];
    for (int i = 0; i < 8; ++i) sum[i] += left * value[i];
  }

  // The first of this thread's terms are loaded, and the others fetched, before the hidden values are there.
  struct Early {
    Bytes16 words[kAhead];  // 0 where there is none
  };
  MOERGE_DEVICE Early load_early(const Memory& m, int64_t block) const {
    Early early{};
    int j = thread() / kItems;
    for (int i = 0; i < kAhead; ++i, j += kSplits)
      if (const T* at = term(m, block, j)) early.words[i] = load16_once(at);
    for (; j < p.route.K * p.a.ranks; j += kSplits)
      if (const T* at = term(m, block, j)) prefetch(at);
    return early;
  }

  // What this thread's element of y begins with: bias or base, and the experts' biases.
  MOERGE_DEVICE float start(const Memory& m, int64_t block) const {
    const int t = thread() / kColumns;
    const int64_t o = block * kColumns + thread() % kColumns;
    float value = 0;
    if (t >= p.route.T || o >= p.b.columns) return value;
    if (!p.weight.data)
      value = to_float(static_cast<const T*>(p.base.data)[t * p.base.stride + o]);
    else if (p.linear_bias)
      value = to_float(static_cast<const T*>(p.linear_bias)[o]);
    if (!p.lora_bias.data) return value;
    const float* weights = m.weights + t * p.route.K;
    for (int k = 0; k < p.route.K; ++k)
      if (weights[k] != 0)
        value += weights[k] * load_as<float>(p.lora_bias.data, p.lora_bias.dtype,
                                             m.experts[t * p.route.K + k] * p.lora_bias.stride + o);
    return value;
  }

  // sums [kAdders, kItems, 8]
  MOERGE_DEVICE void expand(const Memory& m, int64_t block, const Early& early) const {
    const int terms = token_of_terms() < p.route.T ? static_cast<int>(p.route.K * p.a.ranks) : 0;
    float sum[8] = {};
    int j = thread() / kItems;
    for (int i = 0; i < kAhead; ++i, j += kSplits)
      if (j < terms) add_term(m, j, early.words[i], sum);
    for (; j < terms; j += kSplits)
      if (const T* at = term(m, block, j)) add_term(m, j, load16_once(at), sum);
    const Shares mine = add_lanes(sum, kItems < 32 ? kItems : 32);
    float* to = m.sums + (warp() / kItemWarps * kItems + thread() % kItems) * 8 + mine.first;
    for (int i = 0; i < 8; ++i)
      if (mine.writes && i < mine.count) to[i] = sum[i];
  }

  MOERGE_DEVICE void write(const Memory& m, int64_t block, float value) const {
    const int t = thread() / kColumns, column = thread() % kColumns;
    const int64_t o = block * kColumns + column;
    if (t >= p.route.T || o >= p.b.columns) return;
    for (int i = 0; p.weight.data && i < kWarps; ++i) value += m.products[(i * kColumns + column) * kTokens + t];
    for (int i = 0; i < kAdders; ++i) value += m.sums[(i * kItems + t * (kColumns / 8) + column / 8) * 8 + column % 8];
    from_float(value, static_cast<T*>(p.out.data)[t * p.out.stride + o]);
  }

  MOERGE_DEVICE void finish(const Memory& m, int64_t block, const Early& early, float value) const {
    expand(m, block, early);
    sync_block();
    write(m, block, value);
    sync_block();
  }

  MOERGE_DEVICE Memory memory() const {
    Shared all;
    Memory m;
    // those of a fixed size first: they lie at addresses that the compiler knows
    m.sums = all.take<float>(kSums);
    m.weights = all.take<float>(kSlots);
    m.experts = all.take<int32_t>(kSlots);
    m.products = all.take<float>(scratch);
    m.keys = reinterpret_cast<uint32_t*>(m.products);
    m.hidden = all.take<float>(p.route.T * p.route.K * p.a.ranks);
    m.weight = all.take<Bytes16>(staged * Weight::kStage);
    return m;
  }

  MOERGE_DEVICE void operator()() const {
    const Memory m = memory();
    const Weight w{p, blocks, staged, m.weight};
    const int64_t columns = (p.b.columns + kColumns - 1) / kColumns;
    const int each = p.weight.data && block_x() < columns ? w.groups() : 0;
    const int first = each > 2 * kFetched ? each / 2 - kFetched : 0;
    const auto fetch_from = [&](int g) {
      for (int i = 0; each && i < kFetched; ++i) w.fetch(g + i);
    };
    Router{p.route, blocks}.scores(m.sums, [&] { fetch_from(0); });
    uint32_t arrival = grid_arrive();
    for (int i = 0; each && i < staged; ++i) w.issue(block_x(), i, m.weight + i * Weight::kStage + thread());
    int g = 0;
    typename Weight::Product product = {};
    for (; g < first; ++g) w.take(block_x(), g, g, product);
    grid_wait(arrival);
    const Share mine = share();
    select_mine(m, mine);
    if (mine.begin == mine.end) fetch_from(first + kFetched);
    for (int i = mine.begin; i < mine.end; ++i)
      shrink(m, i / static_cast<int>(p.pieces), i % static_cast<int>(p.pieces), [&] {
        if (i == mine.begin) fetch_from(first + kFetched);
      });
    arrival = grid_arrive();
    select_others(m, mine);
    int i = g;
    for (int64_t block = block_x(); block == block_x() || block < columns; block += blocks) {
      const Early early = load_early(m, block);
      for (; i < each; ++i, ++g) w.take(block, i, g, product);
      if (each) Weight::keep(product, m.products);
      const float value = start(m, block);
      if (block == block_x()) {
        grid_wait(arrival);
        collect(m);
      }
      finish(m, block, early, value);
      i = 0;
      for (auto& rows : product)
        for (auto& tile : rows)
          for (float& sum : tile) sum = 0;
    }
  }
};

template <class T, int kTokens>
bool run(const Decode& p, Stream stream) {
  using Kernel = RoutedDecode<T, kTokens>;
  const int64_t columns = ceil_div(p.b.columns, kColumns), pieces = p.route.T * p.route.K * p.pieces;
  const int64_t scores = p.route.parts * (p.route.E + 1);
  int staged = p.weight.data ? kStaged : 0;
  int64_t blocks = most_together<Kernel>(Kernel::shared(p, staged));
  if (blocks == 0 && staged) blocks = most_together<Kernel>(Kernel::shared(p, staged = 0));
  if (blocks == 0) return false;
  const int64_t most = columns > pieces ? columns > scores ? columns : scores : pieces > scores ? pieces : scores;
  if (blocks > most) blocks = most;
  int lanes = 1;
  while (lanes * 8 < p.a.ranks) lanes *= 2;
  launch_together(blocks, Kernel::shared(p, staged), stream,
                  Kernel{p, blocks, Kernel::scratch_of(p.route.E), lanes, staged});
  return true;
}

int64_t tokens_of_kernel(int64_t T) { return T == 1 ? 1 : T <= 4 ? 4 : T <= 8 ? 8 : 16; }

template <class T>
bool run_tokens(const Decode& p, Stream stream) {
  switch (tokens_of_kernel(p.route.T)) {
    case 1:
      return run<T, 1>(p, stream);
    case 4:
      return run<T, 4>(p, stream);
    case 8:
      return run<T, 8>(p, stream);
    default:
      return run<T, 16>(p, stream);
  }
}

// A row of T elements may be read 16 bytes at a time.
bool rows_fit(const Matrix& m, DType dtype) { return m.dtype == dtype && aligned16(m.data, m.stride * 2); }

}  // namespace

Reason against_decode(const Decode& p) {
  const Route& r = p.route;
  const DType dtype = r.x.dtype;
  if (r.T < 1 || r.T > kDecodeTokens) return "it is for 1 to 16 tokens";
  if (p.weight.data && r.T > kDecodeLinearTokens) return "with the base layer in it, it is for one token";
  if (!is_16_bit(dtype) || r.wide) return "the tokens are not of 16 bits";
  if (r.E > kMostExperts) return "there are more than 1024 experts";
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

int64_t plan_decode(Decode& p) {
  Route& r = p.route;
  const int64_t part = tokens_of_kernel(r.T) > 8 ? kThreads / 2 * 8 : kThreads * 8, slots = r.T * r.K;
  r.parts = r.D > part ? ceil_div(r.D, part) : 1;
  p.pieces = slots ? kDecodePieces / slots : 1;
  if (p.pieces < kDecodeLeastParts) p.pieces = kDecodeLeastParts;
  if (p.pieces > kDecodeParts) p.pieces = kDecodeParts;
  return r.parts * (r.T * r.E + r.E + r.T * 2) + p.pieces * slots * p.a.ranks;
}

void set_workspace(Decode& p, float* workspace) {
  Route& r = p.route;
  r.similarity = workspace, workspace += r.parts * r.T * r.E;
  r.gate_sums = workspace, workspace += r.parts * r.E;
  r.moments = workspace, workspace += r.parts * r.T * 2;
  p.parts = workspace;
}

bool routed_decode(const Decode& p, Stream stream) {
  if (against_decode(p)) return false;
  return p.route.x.dtype == DType::bf16 ? run_tokens<bf16>(p, stream) : run_tokens<f16>(p, stream);
}

}  // namespace moerge::cuda
