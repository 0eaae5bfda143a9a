// The router of routed_decode.cu: scores by all blocks together, then every block selects for itself.
//
// A block has one part of the features, which its threads keep of their tokens in registers, and goes through some of
// the experts. x is read once: "standardize" takes every token around a pivot near its mean, as route_scores_mma.cu
// does, and the moments around it are the work of one expert more. Who selects adds up the parts, in order, and takes
// the rest of the mean off. "unit" divides by the largest of the part.
#pragma once

#include "route_select.cuh"

namespace moerge::cuda {

// Sums of 8 values over the lanes that agree in lane % same (a power of 2), which share the results: afterwards lane
// has those of `count` values from `first` on in v[0..count), and of the lanes that have the same ones `writes` is one.
struct Shares {
  int first, count;
  bool writes;
};
MOERGE_DEVICE Shares add_lanes(float (&v)[8], int same) {
  Shares mine{0, 8, true};
  for (int mask = 16, n = 4; mask >= 4; mask /= 2, n /= 2) {
    if (mask < same) continue;
    const bool upper = (lane() & mask) != 0;
    for (int i = 0; i < 4; ++i) {
      if (i >= n) continue;
      const float other = shuffle_xor(upper ? v[i] : v[i + n], mask);
      v[i] = (upper ? v[i + n] : v[i]) + other;
    }
    mine.first += upper ? n : 0, mine.count = n;
  }
  for (int mask = 2; mask >= 1; mask /= 2) {
    if (mask < same) continue;
    v[0] += shuffle_xor(v[0], mask);
    mine.writes = mine.writes && !(lane() & mask);
  }
  return mine;
}

// Scores as numbers that compare like them: 0 is no score, 1 is NaN.
MOERGE_DEVICE uint32_t key_of(float score) {
  const uint32_t bits = as_bits(score + 0.0f);  // -0 becomes 0
  return score != score ? 1 : bits >> 31 ? ~bits : bits | 0x80000000u;
}
MOERGE_DEVICE float score_of(uint32_t key) {
  return key == 1 ? as_float(0x7FC00000u) : as_float(key >> 31 ? key & 0x7FFFFFFFu : ~key);
}

template <class T, int kTokens, int kThreads>
struct DecodeRouter {
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kPer = kTokens > 8 ? 8 : kTokens;                         // tokens per thread
  static constexpr int kGroups = kTokens / kPer, kMembers = kThreads / kGroups;  // of threads, for other tokens each
  static constexpr int kPart = kMembers * 8;                                     // features
  static constexpr int kSlots = 2 * kPer;                                        // of a warp in `sums`
  static constexpr int kSums = 2 * kWarps * kSlots;                              // floats of shared memory
  static constexpr int kSamples = 4;                                             // of 8 features: the pivot
  const Route& p;  // its parts, moments and gate_sums are [parts,T,2] and [parts,E]
  int64_t blocks;

  MOERGE_DEVICE const T* token(int64_t t) const { return static_cast<const T*>(p.x.data) + t * p.x.stride; }
  MOERGE_DEVICE static int first_token() { return thread() / kMembers * kPer; }
  MOERGE_DEVICE int last_expert() const { return static_cast<int>(p.E) - (p.normalize == Normalize::none); }

  // ---- scores -----------------------------------------------------------------------------------------------------

  struct Gate {
    Bytes16 low, high;
    MOERGE_DEVICE float operator[](int i) const { return as_float(i < 4 ? low.word[i] : high.word[i - 4]); }
  };
  MOERGE_DEVICE const float* gate_row(int e) const {
    return static_cast<const float*>(p.gates.data) + e * p.gates.stride;
  }
  MOERGE_DEVICE Gate load_gate(int e, int c) const {
    if (e >= p.E || c >= p.D) return {};
    const float* from = gate_row(e) + c;
    return {load16_once(from), load16_once(from + 4)};
  }

  // What this thread has of one part: 8 features of its tokens, 0 where there is none.
  struct Tokens {
    Bytes16 words[kPer], sample;
    float first, x[kPer][8];
  };
  MOERGE_DEVICE void load(int c, Tokens& mine) const {
    for (int i = 0; i < kPer; ++i) {
      const int64_t t = first_token() + i;
      mine.words[i] = t < p.T && c < p.D ? load16_once(token(t) + c) : Bytes16{};
    }
    const int i = lane() / kSamples < kPer ? lane() / kSamples : 0, t = first_token() + i;
    const T* row = token(t < p.T ? t : 0);
    mine.first = to_float(row[0]);
    mine.sample = load16_once(row + p.D / (8 * kSamples) * 8 * (lane() % kSamples));
  }

  MOERGE_DEVICE void prepare(int c, float* sums, int part, bool measures, Tokens& mine) const {
    float pivot = 0;
    if (p.normalize == Normalize::standardize) {
      // around the first feature, so that equal features give it exactly
      for (int j = 0; j < 4; ++j)
        pivot += (low_half<T>(mine.sample.word[j]) - mine.first) + (high_half<T>(mine.sample.word[j]) - mine.first);
      pivot += shuffle_xor(pivot, 1);
      pivot += shuffle_xor(pivot, 2);
      pivot = mine.first + pivot / (8 * kSamples);
    }
    for (int i = 0; i < kPer; ++i) {
      const float around = shuffle(pivot, i * kSamples), shift = c < p.D ? around : 0;
      for (int j = 0; j < 4; ++j) {
        mine.x[i][2 * j] = low_half<T>(mine.words[i].word[j]) - shift;
        mine.x[i][2 * j + 1] = high_half<T>(mine.words[i].word[j]) - shift;
      }
    }
    if (p.normalize == Normalize::unit) divide_by_largest(sums, part, measures, mine);
  }

  MOERGE_DEVICE void divide_by_largest(float* sums, int part, bool measures, Tokens& mine) const {
    for (int i = 0; i < kPer; ++i) {
      float largest = 0;
      for (float x : mine.x[i]) largest = fmax(largest, fabs(x));
      largest = warp_max(largest);
      if (lane() == 0) sums[warp() * kPer + i] = largest;
    }
    sync_block();
    const int group = thread() / kMembers;
    for (int i = 0; i < kPer; ++i) {
      float largest = 0;
      for (int w = 0; w < kWarps / kGroups; ++w)
        largest = fmax(largest, sums[(group * (kWarps / kGroups) + w) * kPer + i]);
      for (float& x : mine.x[i]) x = largest > 0 ? x / largest : x;
      if (const int64_t t = first_token() + i; measures && thread() % kMembers == 0 && t < p.T)
        p.moments[(part * p.T + t) * 2] = largest;
    }
    sync_block();
  }

  // sums[warp][at ..]: of kPer values over the warp
  MOERGE_DEVICE static void keep(const float (&values)[kPer], float* sums, int at) {
    float v[8] = {};
    for (int i = 0; i < kPer; ++i) v[i] = values[i];
    if constexpr (kPer == 1) {
      v[0] = warp_sum(v[0]);
      if (lane() == 0) sums[warp() * kSlots + at] = v[0];
    } else {
      const Shares mine = add_lanes(v, 1);
      if (mine.writes && mine.first < kPer) sums[warp() * kSlots + at + mine.first] = v[0];
    }
  }

  MOERGE_DEVICE static float add_warps(const float* sums, int group, int at) {
    float total = 0;
    for (int w = 0; w < kWarps / kGroups; ++w) total += sums[(group * (kWarps / kGroups) + w) * kSlots + at];
    return total;
  }

  // By the gate of expert e, which then makes way for that of expert `then`.
  MOERGE_DEVICE void multiply(const Tokens& mine, Gate& gate, int then, int c, float* sums) const {
    float sum[kPer] = {}, gates = 0;
    for (int j = 0; j < 8; ++j) gates += gate[j];
    for (int i = 0; i < kPer; ++i)
      for (int j = 0; j < 8; ++j) sum[i] += mine.x[i][j] * gate[j];
    gate = load_gate(then, c);
    keep(sum, sums, 0);
    gates = warp_sum(gates);
    if (lane() == 0) sums[warp() * kSlots + kPer] = gates;
  }

  MOERGE_DEVICE void measure(const Tokens& mine, float* sums) const {
    float sum[kPer] = {}, squares[kPer] = {};
    for (int i = 0; i < kPer; ++i)
      for (float x : mine.x[i]) sum[i] += x, squares[i] += x * x;
    keep(sum, sums, 0);
    keep(squares, sums, kPer);
  }

  MOERGE_DEVICE void store(int part, int e, const float* sums) const {
    const int t = thread(), group = t / kPer % kGroups, at = t % kPer;
    if (e < p.E && t < p.T) static_cast<float*>(p.similarity)[(part * p.T + t) * p.E + e] = add_warps(sums, group, at);
    if (e < p.E && t == kTokens) p.gate_sums[part * p.E + e] = add_warps(sums, 0, kPer);
    if (e < p.E || t >= p.T) return;
    float* moments = p.moments + (part * p.T + t) * 2;
    if (p.normalize == Normalize::standardize) moments[0] = add_warps(sums, group, at);
    moments[1] = add_warps(sums, group, kPer + at);
  }

  // `meanwhile` is done once the first loads are under way.
  template <class Meanwhile>
  MOERGE_DEVICE void scores(float* sums, const Meanwhile& meanwhile) const {
    const int parts = static_cast<int>(p.parts), many = static_cast<int>(blocks), last = last_expert();
    const int streams = many > parts ? many / parts : 1;
    bool first = true;
    for (int item = static_cast<int>(block_x()); item < parts * streams; item += many) {
      const int part = item % parts, c = part * kPart + thread() % kMembers * 8;
      int e = item / parts;
      if (e > last) continue;
      Gate gate = load_gate(e, c);
      Tokens mine;
      load(c, mine);
      for (int later = e + streams; later < p.E && c < p.D; later += streams) prefetch(gate_row(later) + c);
      if (first) meanwhile();
      first = false;
      prepare(c, sums, part, (static_cast<int>(p.E) - e) % streams == 0, mine);
      for (int round = 0; e <= last; e += streams, ++round) {
        float* here = sums + round % 2 * kWarps * kSlots;
        if (e < p.E)
          multiply(mine, gate, e + streams, c, here);
        else
          measure(mine, here);
        sync_block();
        store(part, e, here);
      }
      sync_block();
    }
    if (first) meanwhile();
  }

  // ---- selection, by one warp -------------------------------------------------------------------------------------

  // A similarity is the sum over the parts of (S - rest * gates) * factor, with the part's largest in it for "unit".
  struct Finish {
    float rest, factor;
  };
  MOERGE_DEVICE Finish finish(int64_t t) const {
    if (p.normalize == Normalize::none) return {0, 1};
    const float* moments = p.moments + t * 2;
    float sum = 0, squares = 0;
    if (p.normalize == Normalize::standardize) {
      for (int64_t part = 0; part < p.parts; ++part)
        sum += moments[part * p.T * 2], squares += moments[part * p.T * 2 + 1];
      const float D = static_cast<float>(p.D), rest = sum / D, variance = squares / D - rest * rest;
      return {rest, 1 / sqrt((variance < 0 ? 0 : variance) + 1e-5f)};
    }
    float largest = 0;
    for (int64_t part = 0; part < p.parts; ++part) largest = fmax(largest, moments[part * p.T * 2]);
    for (int64_t part = 0; part < p.parts; ++part) {
      const float share = largest > 0 ? moments[part * p.T * 2] / largest : 1;
      squares += share * share * moments[part * p.T * 2 + 1];
    }
    if (largest == 0) return {0, squares != squares ? squares : 0};
    return {largest, largest * sqrt(squares) < 1e-12f ? largest * 1e12f : 1 / sqrt(squares)};
  }

  // sum_d norm(x)_d g_ed, whose parts are loaded four at a time.
  MOERGE_DEVICE float similarity(int64_t t, int64_t e, const Finish& f) const {
    const float *sums = static_cast<const float*>(p.similarity) + t * p.E + e, *gates = p.gate_sums + e;
    float total = 0, gate = 0;
    for (int64_t first = 0; first < p.parts; first += 4) {
      float s[4], g[4];
      for (int j = 0; j < 4; ++j) {
        const bool valid = first + j < p.parts;
        s[j] = valid ? sums[(first + j) * p.T * p.E] : 0;
        g[j] = valid ? gates[(first + j) * p.E] : 0;
      }
      for (int j = 0; j < 4; ++j) {
        if (p.normalize == Normalize::unit && first + j < p.parts && f.rest > 0)
          s[j] *= p.moments[((first + j) * p.T + t) * 2] / f.rest;
        total += s[j], gate += g[j];
      }
    }
    return p.normalize == Normalize::standardize ? (total - f.rest * gate) * f.factor : total * f.factor;
  }

  // keys[e] of the token's experts; each lane those that it alone will read
  MOERGE_DEVICE void find_keys(int64_t t, uint32_t* keys) const {
    const Scores<float> scores(p, t);
    const Finish f = finish(t);
    for (int e = lane(); e < p.E; e += 32) {
      const float z = similarity(t, e, f), scaled = (p.absolute ? fabs(z) : z) * static_cast<float>(p.scale);
      keys[e] = scores.eligible(e) ? key_of(scores.bias ? scaled + scores.bias[e] : scaled) : 0;
    }
  }

  // exp(score - highest) over the eligible experts. A NaN score makes the total NaN.
  MOERGE_DEVICE void softmax_all(const uint32_t* keys, float& highest, float& total) const {
    highest = -INFINITY, total = 0;
    for (int e = lane(); e < p.E; e += 32)
      if (keys[e]) highest = fmax(highest, score_of(keys[e]));
    highest = warp_max(highest);
    for (int e = lane(); e < p.E; e += 32)
      if (keys[e]) total += exp(score_of(keys[e]) - highest);
    total = warp_sum(total);
  }

  // weights and experts [K] of token t; keys [E] is the warp's own. K is at most 32.
  MOERGE_DEVICE void select(int64_t t, uint32_t* keys, float* weights, int32_t* experts) const {
    find_keys(t, keys);
    float highest = 0, total = 1, before = 0, mine = -INFINITY;
    if (p.top_p > 0 || p.weighting == Weighting::softmax_all) softmax_all(keys, highest, total);
    int kept = 0;
    for (; kept < p.K; ++kept) {
      if (p.top_p > 0 && before >= static_cast<float>(p.top_p)) break;
      uint32_t best = 0, id = 0;
      for (int e = lane(); e < p.E; e += 32)
        if (keys[e] > best) best = keys[e], id = e;
      const uint32_t key = warp_highest(best);
      if (key == 0) break;
      id = ~warp_highest(best == key ? ~id : 0);
      if (lane() == static_cast<int>(id % 32)) keys[id] = 0;
      if (p.top_p > 0) before += exp(score_of(key) - highest) / total;
      if (lane() == kept) mine = score_of(key), experts[kept] = static_cast<int32_t>(id);
    }
    if (p.weighting == Weighting::softmax) {
      const float top = warp_max(mine), share = lane() < kept ? exp(mine - top) : 0;
      mine = share / warp_sum(share);
    } else if (p.weighting == Weighting::softmax_all) {
      mine = exp(mine - highest) / total;
    } else if (p.weighting == Weighting::sigmoid) {
      mine = 1 / (1 + exp(-mine));
    }
    if (lane() < kept) weights[lane()] = mine;
    sync_warp();
    Selection<float>{p}.fill_unused(kept, weights, experts);
  }
};

}  // namespace moerge::cuda
