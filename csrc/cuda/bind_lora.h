// lora_apply's arguments and its forward, for the bind files of lora_apply and of the routed ops.
#pragma once

#include "bind.h"

namespace moerge::cuda {

// A stack of factors; axis_r and axis_c: which axes of `tensor` are R and C.
inline Factors factors(Call& call, const Tensor& tensor, int axis_r, int axis_c) {
  return {call.read(tensor),
          dtype_of(tensor),
          tensor.stride(0),
          tensor.stride(axis_r),
          tensor.size(axis_c) <= 1 ? 1 : tensor.stride(axis_c),
          tensor.size(axis_r),
          tensor.size(axis_c)};
}

// The arguments of lora_apply as the kernels take them, once `plan` says that they fit.
struct LoraArguments : LoraPlan {
  Lora lora{};
  Factors a, b;    // [E,R,D] and, transposed, [E,R,O]
  Matrix x, bias;  // bias.data null: none

  LoraArguments(const Check& check, const LoraPlan& plan, Call& call, const Tensor& x_in, const Tensor& lora_a,
                const Tensor& lora_b, const Tensor& weights, const Tensor& experts,
                const std::optional<Tensor>& lora_bias, const std::optional<Tensor>& rows, bool factored,
                const std::optional<Tensor>& packed)
      : LoraPlan(plan) {
    check_slots(check, weights, experts, rows, *this);
    MOERGE_CHECK(check, T * K < (int64_t(1) << 31), "T x K must be below 2^31, got ", T, " x ", K);
    lora.T = T, lora.E = E, lora.K = K, lora.R = R;
    lora.factored = factored;
    lora.wide = wide;
    lora.row = row_map(call, rows, N, tokens_per_row);
    lora.weights = call.read(dense(weights, accumulator(wide)));
    lora.experts = static_cast<const int32_t*>(call.read(dense(experts)));
    if (packed) {
      char* data = static_cast<char*>(call.read(*packed));
      const DType type = dtype_of(*packed);
      const int64_t columns = packed->size(1);
      a = {data, type, columns, 1, R, R, D};
      b = {data + R * D * packed->element_size(), type, columns, O, 1, R, O};
    } else {
      a = factors(call, lora_a, 1, 2);
      b = factors(call, lora_b, 2, 1);
    }
    const Tensor x_rows = readable_rows(x_in);
    x = matrix(x_rows, call.read(x_rows));
    if (!lora_bias) return;
    const Tensor values = readable_rows(*lora_bias);
    bias = matrix(values, call.read(values));
  }
};

// Runs lora_shrink, which may need the pairs sorted by expert; they are sorted once per skip_zero.
struct Shrink {
  const Lora& p;
  Call& call;
  Stream stream;
  std::optional<Groups> sorted[2] = {};

  const Groups& groups(bool skip_zero) {
    std::optional<Groups>& found = sorted[skip_zero];
    if (!found) {
      const auto ids = [&](int64_t count) { return static_cast<int32_t*>(call.workspace(count * 4)); };
      found = Groups{ids(p.T * p.K), ids(p.E + 1), ids(most_tiles(p))};
      group_pairs(p, skip_zero, *found, stream);
    }
    return *found;
  }

  void* operator()(const Matrix& x, const Factors& w, bool skip_zero) {
    void* h = call.workspace(p.parts * p.T * p.K * p.R * accumulator_size(p.wide));
    const Groups& used = shrink_uses_groups(p, x, w) ? groups(skip_zero) : Groups{};
    lora_shrink(p, x, w, skip_zero, used, h, stream);
    return h;
  }
};

// What lora_expand reads in place of h; null: nothing.
inline const void* prepared_expand(const Lora& p, Call& call, const void* h, const Factors& w, DType out,
                                   Stream stream) {
  const int64_t bytes = expand_workspace(p, w, out);
  if (bytes == 0) return nullptr;
  void* workspace = call.workspace(bytes);
  expand_prepare(p, h, w, workspace, stream);
  return workspace;
}

// A forward in its two halves; work on another stream may be enqueued between them.
struct Branch {
  const LoraArguments& args;
  Call& call;
  DType out;
  Lora p = args.lora;
  const void *h = nullptr, *prepared = nullptr;

  void shrink(Stream stream) {
    p.parts = shrink_parts(p, args.x, args.a);
    h = Shrink{p, call, stream}(args.x, args.a, true);
    prepared = prepared_expand(p, call, h, args.b, out, stream);
  }
  // base: as lora_expand takes it; to: of the type `out`
  void expand(const Matrix& base, const Matrix& to, Stream stream) const {
    lora_expand(p, h, prepared, args.b, base, args.bias, to, stream);
    call.finish();
  }
};

inline void run_forward(const LoraArguments& args, Call& call, const Matrix& base, const Matrix& out) {
  Branch branch{args, call, out.dtype};
  branch.shrink(call.stream());
  branch.expand(base, out, call.stream());
}

inline void forward(const LoraArguments& args, Call& call, const Tensor& base_in, const Tensor& out) {
  if (out.numel() == 0) return;
  const Tensor base = readable_rows(base_in);
  run_forward(args, call, matrix(base, call.read(base)), matrix(out, call.write(out)));
}

// The forward written into base, whose rows are readable.
inline void update(const LoraArguments& args, Call& call, const Tensor& base) {
  if (base.numel() == 0) return;
  const Matrix rows_of = matrix(base, call.update(base));
  run_forward(args, call, rows_of, rows_of);
}

}  // namespace moerge::cuda
