// What is the same around the CPU and the CUDA kernels of edlstm_gates: checks, layouts, allocation.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <optional>
#include <string>
#include <tuple>

#include "common/devices.h"
#include "common/layout.h"
#include "common/text.h"
#include "edlstm_gates/edlstm_gates_problem.h"

namespace vpfast {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class G, class C>
struct Types {
  using Gates = G;
  using Cell = C;
};

// Calls body(Types<gates, cell>{}).
template <class Body>
void for_types(ScalarType gates, ScalarType cell, const Body& body) {
  if (gates == ScalarType::Float && cell == gates) return body(Types<float, float>{});
  if (gates == ScalarType::Double && cell == gates) return body(Types<double, double>{});
  if (gates == ScalarType::Half && cell == gates) return body(Types<Half, Half>{});
  if (gates == ScalarType::Half && cell == ScalarType::Float) return body(Types<Half, float>{});
  if (gates == ScalarType::BFloat16 && cell == gates) return body(Types<BFloat16, BFloat16>{});
  if (gates == ScalarType::BFloat16 && cell == ScalarType::Float) return body(Types<BFloat16, float>{});
  STD_TORCH_CHECK(false,
                  "edlstm_gates: gates must be float64/32/16 or bfloat16, with c_prev of the same type, or float32 ",
                  "beside half-precision gates");
}

void check_inputs(const Tensor& gates, const Tensor& c_prev, const std::string& order) {
  STD_TORCH_CHECK(gates.dim() >= 2 && gates.dim() == c_prev.dim(),
                  "edlstm_gates: gates (B, 4C, *) and c_prev (B, C, *)");
  for (int64_t d = 0; d < gates.dim(); ++d) {
    const int64_t parts = d == 1 ? 4 : 1;
    STD_TORCH_CHECK(gates.size(d) == parts * c_prev.size(d), "edlstm_gates: dim ", d, " of gates is ", gates.size(d),
                    ", of c_prev ", c_prev.size(d));
  }
  STD_TORCH_CHECK(order.size() == 4, "edlstm_gates: order must be a permutation of 'fiog'");
  for (char gate : {'f', 'i', 'o', 'g'}) {
    STD_TORCH_CHECK(order.find(gate) != std::string::npos, "edlstm_gates: order must be a permutation of 'fiog'");
  }
  check_device("edlstm_gates", {"gates", gates}, {"c_prev", c_prev});
  for_types(gates.scalar_type(), c_prev.scalar_type(), [](auto) {});
}

void check_gradient(const char* name, const Tensor& grad, const Tensor& like, ScalarType dtype) {
  bool same = grad.dim() == like.dim() && grad.scalar_type() == dtype;
  for (int64_t d = 0; same && d < like.dim(); ++d) same = grad.size(d) == like.size(d);
  STD_TORCH_CHECK(same, name, " has another shape or type than the output it belongs to");
}

// The common part of forward and backward: which layout, how many rows of which length, where each gate lies.
Problem plan(const Tensor& gates, const Tensor& c_prev, const std::string& order, Layout layout) {
  Problem p{};
  p.rows = layout == Layout::contiguous ? c_prev.size(0) : c_prev.numel() / c_prev.size(1);
  p.row_length = c_prev.numel() / p.rows;
  p.offset_f = static_cast<int64_t>(order.find('f')) * p.row_length;
  p.offset_i = static_cast<int64_t>(order.find('i')) * p.row_length;
  p.offset_o = static_cast<int64_t>(order.find('o')) * p.row_length;
  p.offset_g = static_cast<int64_t>(order.find('g')) * p.row_length;
  p.gates = gates.const_data_ptr();
  p.gates_stride = row_stride(gates, layout);
  p.c_prev = c_prev.const_data_ptr();
  p.c_prev_stride = row_stride(c_prev, layout);
  return p;
}

// `Device` runs a problem of given types on the tensors of its device:
//   Device(const Tensor&)                   what must hold while tensors are made and kernels run
//   forward<TG, TC>(const Problem&) const   and backward
template <class Device>
std::tuple<Tensor, Tensor> forward(Tensor gates, Tensor c_prev, Text order) {
  check_inputs(gates, c_prev, order);
  const Device device(gates);
  const Layout layout = layout_of(gates);
  Tensor h = empty_as(c_prev, gates.scalar_type(), layout);
  Tensor c = empty_as(c_prev, c_prev.scalar_type(), layout);
  if (c_prev.numel() == 0) return {h, c};

  gates = in_rows(gates, layout);
  c_prev = in_rows(c_prev, layout);
  Problem p = plan(gates, c_prev, order, layout);
  p.h = h.mutable_data_ptr();
  p.c = c.mutable_data_ptr();
  for_types(gates.scalar_type(), c_prev.scalar_type(), [&](auto types) {
    device.template forward<typename decltype(types)::Gates, typename decltype(types)::Cell>(p);
  });
  return {h, c};
}

template <class Device>
std::tuple<Tensor, Tensor> backward(std::optional<Tensor> grad_h, std::optional<Tensor> grad_c, Tensor gates,
                                    Tensor c_prev, Text order) {
  check_inputs(gates, c_prev, order);
  if (grad_h) check_device("edlstm_gates", {"gates", gates}, {"grad_h", *grad_h});
  if (grad_c) check_device("edlstm_gates", {"gates", gates}, {"grad_c", *grad_c});
  const Device device(gates);
  const Layout layout = layout_of(gates);
  Tensor grad_gates = empty_as(gates, gates.scalar_type(), layout);
  Tensor grad_c_prev = empty_as(c_prev, c_prev.scalar_type(), layout);
  if (c_prev.numel() == 0) return {grad_gates, grad_c_prev};

  gates = in_rows(gates, layout);
  c_prev = in_rows(c_prev, layout);
  Problem p = plan(gates, c_prev, order, layout);
  if (grad_h) {
    check_gradient("grad_h", *grad_h, c_prev, gates.scalar_type());
    grad_h = in_rows(*grad_h, layout);
    p.grad_h = grad_h->const_data_ptr();
    p.grad_h_stride = row_stride(*grad_h, layout);
  }
  if (grad_c) {
    check_gradient("grad_c", *grad_c, c_prev, c_prev.scalar_type());
    grad_c = in_rows(*grad_c, layout);
    p.grad_c = grad_c->const_data_ptr();
    p.grad_c_stride = row_stride(*grad_c, layout);
  }
  p.grad_gates = grad_gates.mutable_data_ptr();
  p.grad_c_prev = grad_c_prev.mutable_data_ptr();
  for_types(gates.scalar_type(), c_prev.scalar_type(), [&](auto types) {
    device.template backward<typename decltype(types)::Gates, typename decltype(types)::Cell>(p);
  });
  return {grad_gates, grad_c_prev};
}

}  // namespace
}  // namespace vpfast
