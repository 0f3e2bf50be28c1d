// Contiguous or channels_last: finding it, allocating it, and seeing a tensor as rows of it.
//
// A row is what lies together in memory: in the contiguous layout everything after the batch dimension, in
// channels_last the channels of one position. The rules are those of vpfast/ops/edlstm_gates/register.py:
// `memory_format` there and `layout_of` here must agree, since one allocates for torch.compile what the other allocates
// for real.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

namespace vpfast {

enum class Layout { contiguous, channels_last };

// Are all dims but the first packed in C order? Dims of size 1 may have any stride.
inline bool has_packed_rows(const torch::stable::Tensor& t) {
  int64_t expected = 1;
  for (int64_t d = t.dim() - 1; d >= 1; --d) {
    if (t.size(d) == 1) continue;
    if (t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}

inline bool is_channels_last(const torch::stable::Tensor& t) {
  if (t.dim() != 4 && t.dim() != 5) return false;
  int64_t expected = 1;
  auto step = [&](int64_t d) {
    if (t.size(d) == 1) return true;
    if (t.stride(d) != expected) return false;
    expected *= t.size(d);
    return true;
  };
  if (!step(1)) return false;
  for (int64_t d = t.dim() - 1; d >= 2; --d) {
    if (!step(d)) return false;
  }
  return step(0);
}

inline Layout layout_of(const torch::stable::Tensor& t) {
  return !t.is_contiguous() && is_channels_last(t) ? Layout::channels_last : Layout::contiguous;
}

inline torch::headeronly::MemoryFormat memory_format(Layout layout, int64_t dims) {
  using torch::headeronly::MemoryFormat;
  if (layout == Layout::contiguous) return MemoryFormat::Contiguous;
  return dims == 5 ? MemoryFormat::ChannelsLast3d : MemoryFormat::ChannelsLast;
}

// Uninitialized, of the shape and on the device of `t`.
inline torch::stable::Tensor empty_as(const torch::stable::Tensor& t, torch::headeronly::ScalarType dtype,
                                      Layout layout) {
  return torch::stable::empty(t.sizes(), dtype, std::nullopt, t.device(), std::nullopt, memory_format(layout, t.dim()));
}

// `t` itself where its rows are packed (they may lie any distance apart, also 0), else a copy in `layout`.
inline torch::stable::Tensor in_rows(const torch::stable::Tensor& t, Layout layout) {
  const bool usable = layout == Layout::contiguous ? has_packed_rows(t) : is_channels_last(t);
  return usable ? t : torch::stable::contiguous(t, memory_format(layout, t.dim()));
}

// Elements from one row of `in_rows(t, layout)` to the next.
inline int64_t row_stride(const torch::stable::Tensor& t, Layout layout) {
  return layout == Layout::contiguous ? t.stride(0) : t.size(1);
}

}  // namespace vpfast
