// Which keys a query sees, in integers: the rules of Mask3d. Of every mask, with or without a window, this is true:
// the keys of one line that a query sees are an interval. A line is the longest stretch of raster order for which that
// holds: the whole sequence, a frame, or a row of one.
//
//   rule           keys of frame t' that a query at (t, j) sees, j = y W + x
//   raster         all where t' < t, the first j + 1 where t' = t
//   raster_strict  all where t' < t, the first j where t' = t
//   past_frames    all where t' < t
//   separable      the first j + 1 where t' <= t
//   eq6            the first j where t' < t
//
// A window of radius r hides what is further than r away along an axis.
#pragma once

#include <cstdint>

namespace vpfast::masked_attention3d {

enum class Rule { raster, raster_strict, past_frames, separable, eq6 };
enum class Line { sequence, frame, row };

struct Mask {
  Rule rule;
  Line line;
  int64_t frames, rows, columns;         // T, H, W
  int64_t radius_t, radius_y, radius_x;  // as large as the grid where there is no window
  int64_t frame() const { return rows * columns; }
  int64_t length() const { return frames * frame(); }
  int64_t line_length() const { return line == Line::sequence ? length() : line == Line::frame ? frame() : columns; }
};

// A place in the grid, in raster order too.
struct Place {
  int64_t index, t, y, x;
};

inline Place place_of(const Mask& m, int64_t index) {
  return {index, index / m.frame(), index / m.columns % m.rows, index % m.columns};
}

// Keys [begin, end) of a line, counted from its start.
struct Interval {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
};

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// How many keys of frame t, from its first on, the rule shows to query q.
inline int64_t shown_of_frame(const Mask& m, const Place& q, int64_t t) {
  const int64_t j = q.index - q.t * m.frame();
  if (t > q.t) return 0;
  switch (m.rule) {
    case Rule::raster:
      return t < q.t ? m.frame() : j + 1;
    case Rule::raster_strict:
      return t < q.t ? m.frame() : j;
    case Rule::past_frames:
      return t < q.t ? m.frame() : 0;
    case Rule::separable:
      return j + 1;
    default:
      return t < q.t ? j : 0;
  }
}

// What query q sees of a line: the line is the sequence, frame t, or row y of frame t.
inline Interval visible(const Mask& m, const Place& q, int64_t t, int64_t y) {
  if (m.line == Line::sequence) {
    return {most(0, q.t - m.radius_t) * m.frame(), q.t * m.frame() + shown_of_frame(m, q, q.t)};
  }
  if (t > q.t || q.t - t > m.radius_t) return {0, 0};
  const int64_t shown = shown_of_frame(m, q, t);
  if (m.line == Line::frame) {
    return {most(0, q.y - m.radius_y) * m.columns, least(shown, (q.y + m.radius_y + 1) * m.columns)};
  }
  if (q.y - y > m.radius_y || y - q.y > m.radius_y) return {0, 0};
  return {most(0, q.x - m.radius_x), least(shown - y * m.columns, least(m.columns, q.x + m.radius_x + 1))};
}

// Calls body(t, y, first key) for every line that queries first .. last may see keys of.
template <class Body>
inline void for_each_line(const Mask& mask, const Place& first, const Place& last, const Body& body) {
  if (mask.line == Line::sequence) return body(0, 0, int64_t{0});
  const bool one_frame = first.t == last.t;
  for (int64_t t = most(0, first.t - mask.radius_t); t <= last.t; ++t) {
    if (mask.line == Line::frame) {
      body(t, 0, t * mask.frame());
      continue;
    }
    const int64_t top = one_frame ? most(0, first.y - mask.radius_y) : 0;
    const int64_t bottom = one_frame ? least(mask.rows - 1, last.y + mask.radius_y) : mask.rows - 1;
    for (int64_t y = top; y <= bottom; ++y) body(t, y, (t * mask.rows + y) * mask.columns);
  }
}

// Queries [begin, end) hold all that see any of the keys [first, last] of one line.
inline Interval seen_by(const Mask& m, int64_t first, int64_t last) {
  const int64_t t = first / m.frame();
  const bool own_frame = m.rule != Rule::past_frames && m.rule != Rule::eq6;
  int64_t begin = own_frame ? first : (t + 1) * m.frame();
  if (m.rule == Rule::raster_strict) begin = first + 1;
  return {begin, least(m.length(), (last / m.frame() + m.radius_t + 1) * m.frame())};
}

// What 32 queries see, in a form that is the same for all: of line (t, y), keys [begin, end) up to those shown,
// `earlier` of a frame before the query's and `own` of its own. Shown keys count from the frame's start, or the
// sequence's where that is the line.
constexpr int64_t kBlock = 32;

struct Sight {
  int32_t t[kBlock], y[kBlock], earlier[kBlock], own[kBlock], begin[kBlock], end[kBlock];
};

// Of `count` queries from the first on; the others see nothing.
inline Sight sight_of(const Mask& m, int64_t first, int64_t count) {
  Sight sight{};
  Place q = place_of(m, first);
  for (int64_t i = 0; i < kBlock; ++i) {
    if (i >= count) {
      sight.t[i] = -1;
      continue;
    }
    Interval inside{0, INT32_MAX};
    int64_t before = 0;
    if (m.line == Line::sequence) {
      before = q.t * m.frame();
      inside.begin = most(0, q.t - m.radius_t) * m.frame();
    } else if (m.line == Line::frame) {
      sight.t[i] = static_cast<int32_t>(q.t);
      inside = {most(0, q.y - m.radius_y) * m.columns, (q.y + m.radius_y + 1) * m.columns};
    } else {
      sight.t[i] = static_cast<int32_t>(q.t);
      sight.y[i] = static_cast<int32_t>(q.y);
      inside = {most(0, q.x - m.radius_x), least(m.columns, q.x + m.radius_x + 1)};
    }
    const int64_t own = before + shown_of_frame(m, q, q.t);
    sight.own[i] = static_cast<int32_t>(own);
    sight.earlier[i] = static_cast<int32_t>(m.line == Line::sequence ? own : shown_of_frame(m, q, q.t - 1));
    sight.begin[i] = static_cast<int32_t>(inside.begin);
    sight.end[i] = static_cast<int32_t>(least(inside.end, INT32_MAX));
    ++q.index;
    if (++q.x < m.columns) continue;
    q.x = 0;
    if (++q.y < m.rows) continue;
    q.y = 0;
    ++q.t;
  }
  return sight;
}

}  // namespace vpfast::masked_attention3d
