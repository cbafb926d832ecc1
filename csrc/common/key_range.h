// Key ranges: query i sees the keys lo(i) <= j < hi(i). See hierkernels/key_range.py for the definition.
#pragma once
#include <cstdint>

#include "anywhere.h"

namespace hierkernels {

// bound(i) = clip(((i + shift) / step) * rise + offset, floor, n_keys), canonical: 0 <= shift < step.
struct Staircase {
  int64_t shift, step, rise, offset, floor;

  HIERKERNELS_ANYWHERE int64_t at(int64_t i, int64_t n_keys) const {
    int64_t x = (step == 1 ? i + shift : (i + shift) / step) * rise + offset;  // most steps are 1, division is slow
    if (x < floor) x = floor;
    return x < n_keys ? x : n_keys;
  }
  // at(r / group) for the packed rows r in [row, row + n).
  void fill(int64_t row, int n, int64_t group, int64_t n_keys, int32_t* to) const {
    const Staircase s = *this;  // in registers: `to` cannot alias it
    if (s.step == 1 && group == 1) {  // the common case, without divisions: vectorises
      for (int r = 0; r < n; ++r) {
        int64_t x = (row + r + s.shift) * s.rise + s.offset;
        x = x < s.floor ? s.floor : x;
        to[r] = static_cast<int32_t>(x < n_keys ? x : n_keys);
      }
    } else {
      for (int r = 0; r < n; ++r) to[r] = static_cast<int32_t>(s.at((row + r) / group, n_keys));
    }
  }
  // The smallest i in [0, n_queries] with at(i) >= x; 1 <= x <= n_keys.
  HIERKERNELS_ANYWHERE int64_t first_reaching(int64_t x, int64_t n_queries) const {
    if (x <= floor || x <= offset) return 0;
    if (rise == 0) return n_queries;
    const int64_t i = (x - offset + rise - 1) / rise * step - shift;
    return i < 0 ? 0 : i < n_queries ? i : n_queries;
  }
};

struct KeyRange {
  Staircase lo, hi;
};

}  // namespace hierkernels
