#pragma once

#include <vector>

#include "apionly-domain/base/address.h"

namespace mvgpu {

// As a run of its own, or as a part of the last one that goes on there.
inline void AppendRun(PageRun pages, std::vector<PageRun>* runs) {
  if (!runs->empty() && runs->back().end() == pages.first) {
    runs->back().count += pages.count;
  } else {
    runs->push_back(pages);
  }
}

}  // namespace mvgpu
