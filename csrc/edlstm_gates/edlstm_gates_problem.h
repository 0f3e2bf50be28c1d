// What one call of edlstm_gates is about, as its kernels see it.
//
// Both layouts are the same shape of work: `rows` independent rows, each of four gate blocks of `row_length` elements
// one after another, beside a cell row of `row_length`.
//   contiguous (B, 4C, *):   B rows of length C*S       (S = product of the trailing dims)
//   channels_last:           B*S rows of length C
// Rows may lie any distance apart, so a slice over the batch (one time step of a clip) and a batch-expanded state are
// read where they are; any other layout is copied once.
#pragma once

#include <cstdint>

namespace vpfast {
namespace {

// Offsets and strides are in elements of the tensor they belong to; outputs are dense.
struct Problem {
  int64_t rows, row_length;
  int64_t offset_f, offset_i, offset_o, offset_g;
  const void *gates, *c_prev;
  int64_t gates_stride, c_prev_stride;
  void *h, *c;
  const void *grad_h, *grad_c;  // null: a gradient of zeros
  int64_t grad_h_stride, grad_c_stride;
  void *grad_gates, *grad_c_prev;
};

}  // namespace
}  // namespace vpfast
