// A string argument of an op.
//
// As std::string, every call would leak it: torch's conversion (2.10 to 2.13, pytorch #190493) returns a copy of a `new
// std::string` that nobody deletes. 48 bytes each, and worse than their number: they lie between the caller's own
// tensors, whose memory then does not fit the next ones. SmolLM2-135M with 210 patched layers grew by 330 MB in 200
// tokens of `generate`, and every token of it had 3000 to 5000 page faults.
#pragma once

#include <torch/csrc/stable/stableivalue_conversions.h>

#include <string>

namespace moerge {

struct Word : std::string {
  using std::string::string;
};

}  // namespace moerge

// Takes the string over from torch, as the conversion of std::string does.
template <>
struct torch::stable::detail::ToImpl<moerge::Word> {
  static moerge::Word call(StableIValue value, uint64_t, bool) {
    const StringHandle handle = to<StringHandle>(value);
    const char* data;
    size_t length;
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    moerge::Word word(data, length);
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return word;
  }
};
