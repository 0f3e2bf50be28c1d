// A `str` argument of an operator.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstddef>
#include <cstdint>
#include <string>

namespace vpfast {

// As a parameter in place of std::string, for which torch makes a second string that it never frees: 48 bytes a call
// (torch 2.13), without end in a process that streams.
struct Text : std::string {
  using std::string::string;
};

}  // namespace vpfast

namespace torch::stable::detail {

template <>
struct ToImpl<vpfast::Text> {
  static vpfast::Text call(StableIValue value, uint64_t, bool) {
    const auto handle = to<StringHandle>(value);
    size_t length = 0;
    const char* data = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    vpfast::Text text(data, length);
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};

}  // namespace torch::stable::detail
