// A mask from the words and numbers that an operator is given.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "masked_attention3d/masked_attention3d_math.h"

namespace vpfast::masked_attention3d {

inline Rule rule_of(const std::string& name) {
  if (name == "raster") return Rule::raster;
  if (name == "raster_strict") return Rule::raster_strict;
  if (name == "past_frames") return Rule::past_frames;
  if (name == "separable") return Rule::separable;
  if (name == "eq6") return Rule::eq6;
  STD_TORCH_CHECK(false, "masked_attention3d: there is no mask '", name, "'");
}

inline Mask mask_of(const std::vector<int64_t>& grid, const std::string& name, const std::vector<int64_t>& window) {
  STD_TORCH_CHECK(grid.size() == 3 && window.size() == 3, "masked_attention3d: grid and window have three numbers");
  int64_t radius[3];
  for (int axis = 0; axis < 3; ++axis) {
    STD_TORCH_CHECK(grid[axis] >= 0, "masked_attention3d: negative grid");
    radius[axis] = window[axis] < 0 || window[axis] > grid[axis] ? grid[axis] : window[axis];
  }
  Mask m{rule_of(name), Line::sequence, grid[0], grid[1], grid[2], radius[0], radius[1], radius[2]};
  STD_TORCH_CHECK(m.length() <= std::numeric_limits<int32_t>::max(), "masked_attention3d: 2^31 positions or more");
  if (m.radius_x < m.columns - 1) {
    m.line = Line::row;
  } else if (m.radius_y < m.rows - 1 || m.rule == Rule::separable || m.rule == Rule::eq6) {
    m.line = Line::frame;
  }
  return m;
}

}  // namespace vpfast::masked_attention3d
